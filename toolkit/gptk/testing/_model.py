"""The contract of models, see the protocol `gptk.CausalModel`."""

import functools
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import gptk
from gptk.testing._decoding import SEEDS, decode, decode_together, without_numbers
from gptk.testing._passes import (
    TrackedCache,
    all_layers,
    check_lengths,
    compare,
    logits_of,
    longest,
    padded,
    read,
    states_of,
)
from gptk.testing._promises import check, instance, promise, undisturbed, worst_and_drawn

Drawn = TypeVar("Drawn")


class ModelContract:
    """What a model promises to decoding; `gptk.CausalModel` is the protocol."""

    make: ClassVar[Any]
    """The model's class, or a function without arguments that returns a model, in float32."""

    @functools.cached_property
    def model(self) -> gptk.CausalModel:
        """The model to test: what `make` makes, once for each promise."""
        model: gptk.CausalModel = instance(self)
        if isinstance(model, nn.Module):
            model.eval()
        return model

    @promise
    @worst_and_drawn(5)
    def test_states_are_as_the_configuration_says(self, data: st.DataObject | None) -> None:
        """`states` returns (rows, time, 1 + layers, width) of the model's dtype, on its device.

        With `n_layers` 0 there are no layers to ask for, and with `width` 0 any width will do.
        """
        model, config = self.model, self.model.config
        check(min(config.vocab_size, config.context_length) >= 1, "a size is not 1 or more")
        check(min(config.width, config.n_layers) >= 0, "width or n_layers is negative")
        texts = self._texts(data)
        layers = all_layers(model)
        ids, counts = padded(model, texts)
        for cache in (None, model.new_cache(len(texts), 4)):
            states = read(model, ids, cache, counts, layers)
            check(isinstance(states, Tensor), f"it returns {states!r:.50}, not a tensor")
            want = (*ids.shape, 1 + len(layers), config.width or states.shape[-1])
            check(states.shape == want, f"states are {tuple(states.shape)}, and not {want}")
            check(states.dtype == model.dtype, f"states are {states.dtype}, and not {model.dtype}")
            check(states.device == ids.device, f"states are on {states.device}")

    @promise
    @worst_and_drawn(5)
    def test_its_input_is_not_changed(self, data: st.DataObject | None) -> None:
        """Token ids, counts and states that it is given stay as they were."""
        model = self.model
        ids, counts = padded(model, self._texts(data))
        before = ids.clone(), list(counts)
        for cache in (None, model.new_cache(len(ids), 4)):
            states = read(model, ids, cache, counts)
            check(torch.equal(ids, before[0]), "states() changed the token ids in place")
            check(counts == before[1], "states() changed the counts")
            copy = states.clone()
            logits_of(model, states[:, :, 0])
            check(torch.equal(states, copy), "logits() changed the states in place")

    @promise
    @worst_and_drawn(5)
    def test_logits_are_as_the_configuration_says(self, data: st.DataObject | None) -> None:
        """`logits` returns (…, vocab_size) float32 for states (…, width), without NaN and +inf."""
        model = self.model
        ids, counts = padded(model, self._texts(data, equal=True))
        states = read(model, ids, None, counts, all_layers(model))
        for part in (states, states[:, :, 0], states[0, :, 0], states[0, 0, 0]):
            logits = logits_of(model, part)
            want = (*part.shape[:-1], model.config.vocab_size)
            check(logits.shape == want, f"logits are {tuple(logits.shape)}, and not {want}")
            check(logits.dtype == torch.float32, f"logits are {logits.dtype}")
            check(logits.device == ids.device, f"logits are on {logits.device}")
            check(bool(logits.amax(-1).isfinite().all()), "logits are NaN, +inf, or all -inf")

    @promise
    @worst_and_drawn(5)
    def test_equal_input_gives_equal_output(self, data: st.DataObject | None) -> None:
        """States and logits are the same each time; the global random generators are not used."""
        model, texts = self.model, self._texts(data)
        with undisturbed():
            first = states_of(model, texts)
            logits = logits_of(model, first[0][:, 0])
        torch.manual_seed(1)
        for states, again in zip(first, states_of(model, texts), strict=True):
            compare(again, states, f"{texts} the second time")
        compare(logits_of(model, first[0][:, 0]), logits, "the logits the second time")

    @promise
    @worst_and_drawn(5)
    def test_layers_that_are_asked_for_are_returned(self, data: st.DataObject | None) -> None:
        """After the final state come the states of `layers`, in ascending order.

        0 are the embeddings, which do not depend on other tokens. Which layers are asked for does
        not change the states.
        """
        model = self.model
        if not model.config.n_layers:
            pytest.skip("the model has no layers to ask for")
        every = all_layers(model)
        layers = sorted(_draw(data, {every[-1]}, st.sets(st.sampled_from(every)), "layers"))
        text, other = self._texts(data, rows=2, equal=True)
        whole = states_of(model, [text], layers=every)[0]
        want = whole[:, [0, *(1 + layer for layer in layers)]]
        compare(states_of(model, [text], layers=layers)[0], want, f"with the layers {layers}")
        cache = model.new_cache(1, len(text))
        for end, token in enumerate(text, start=1):
            got = states_of(model, [[token]], cache, layers=layers)[0]
            compare(got, want[end - 1 : end], f"with the layers {layers} and a cache")
        changed = states_of(model, [[*other[:-1], text[-1]]], layers=every)[0]
        compare(changed[-1, 1], whole[-1, 1], "layer 0 after other tokens")

    @promise
    @worst_and_drawn(5)
    def test_later_tokens_change_nothing(self, data: st.DataObject | None) -> None:
        """The state of a token depends only on that token and on the tokens before it."""
        text, other = self._texts(data, rows=2)
        same = states_of(self.model, [text])[0]
        longer = states_of(self.model, [text + other])[0]
        compare(longer[: len(text)], same, f"{text} before {other} and alone")

    @promise
    @worst_and_drawn(8)
    def test_the_cache_changes_nothing(self, data: st.DataObject | None) -> None:
        """States are the same in a pass without a cache and in one or several passes with one."""
        model, texts = self.model, self._texts(data, equal=True)
        length = len(texts[0])
        want = states_of(model, texts)
        drawn = _draw(data, {1}, st.sets(st.integers(1, length)), "ends of passes")
        for ends in ([*sorted(drawn - {length}), length], range(1, length + 1)):
            cache, start = model.new_cache(len(texts), length), 0
            for end in ends:
                got = states_of(model, [text[start:end] for text in texts], cache)
                for row, states in enumerate(got):
                    what = f"row {row} of {texts}, tokens {start} to {end - 1}, with a cache"
                    compare(states, want[row][start:end], what)
                check_lengths(cache, [end] * len(texts), "after a pass")
                start = end

    @promise
    @worst_and_drawn(8)
    def test_rows_are_independent(self, data: st.DataObject | None) -> None:
        """A row gets the states that it gets alone, whatever the other rows and the padding are.

        Rows may have unequal numbers of tokens: `counts` says how many; the rest is padding.
        """
        model, texts = self.model, self._texts(data)
        last = model.config.vocab_size - 1
        padding = _draw(data, last, st.integers(0, last), "padding")
        want = [states_of(model, [text])[0] for text in texts]
        for row, states in enumerate(states_of(model, texts, padding=padding)):
            compare(states, want[row], f"row {row} of {texts} and alone")
        tracked = TrackedCache(model, texts, data, padding=padding)
        tracked.read()
        tracked.read()

    @promise
    @worst_and_drawn(8)
    def test_its_cache_copies_reorders_and_drops_rows(self, data: st.DataObject | None) -> None:
        """After `select(parents)` row i is a copy of row parents[i]; copies are independent."""
        tracked = TrackedCache(self.model, self._texts(data), data)
        for _ in range(2):
            tracked.select()
            tracked.read()

    @promise
    @worst_and_drawn(8)
    def test_its_cache_drops_tokens(self, data: st.DataObject | None) -> None:
        """After `rewind(counts)` row i goes on as if its last counts[i] tokens had not been read.

        All tokens of a row may be dropped.
        """
        tracked = TrackedCache(self.model, self._texts(data), data)
        for _ in range(2):
            tracked.rewind()
            tracked.read()

    @promise
    @worst_and_drawn(5)
    def test_its_cache_forgets_all_tokens(self, data: st.DataObject | None) -> None:
        """After `clear` there are as many rows as before, without tokens."""
        tracked = TrackedCache(self.model, self._texts(data), data)
        tracked.select()
        tracked.clear()
        tracked.read()

    @promise
    @worst_and_drawn(12)
    def test_its_cache_follows_any_moves(self, data: st.DataObject | None) -> None:
        """After any passes, selections and rewinds its rows go on as rows that grew directly."""
        tracked = TrackedCache(self.model, self._texts(data), data)
        for move in _draw(data, _WORST_MOVES, _MOVES, "moves"):
            getattr(tracked, move)()
        tracked.read()

    @promise
    def test_a_cache_grows_up_to_the_window(self) -> None:
        """A cache takes as many tokens as the window has, even if its `capacity` is smaller.

        This is tested with up to 256 tokens.
        """
        model = self.model
        length = min(model.config.context_length, 256)
        text = [7 * i % model.config.vocab_size for i in range(length)]
        want = states_of(model, [text])[0]
        cache = model.new_cache(1, 1)
        for start, end in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
            if end > start:
                got = states_of(model, [text[start:end]], cache)[0]
                what = f"tokens {start} to {end - 1} in a cache of capacity 1"
                compare(got, want[start:end], what)

    @promise
    @worst_and_drawn(5)
    def test_caches_are_independent(self, data: st.DataObject | None) -> None:
        """Two caches of a model, such as those of two sessions, can be used in turns."""
        first = TrackedCache(self.model, self._texts(data), data)
        second = TrackedCache(self.model, self._texts(data), data)
        for tracked in (first, second, first):
            tracked.read()

    @promise
    @worst_and_drawn(5)
    def test_logits_are_a_function_of_states(self, data: st.DataObject | None) -> None:
        """The logits of a state do not depend on other states or on what was read last."""
        model = self.model
        states = torch.cat(states_of(model, self._texts(data)))[:, 0]
        want = logits_of(model, states)
        others = torch.cat(states_of(model, self._texts(data)))[:, 0]
        together = logits_of(model, torch.cat((states, others)))
        compare(together[: len(states)], want, "logits after another pass")
        for state, logits in zip(states, want, strict=True):
            compare(logits_of(model, state), logits, "logits of a state alone and with others")

    @promise
    @worst_and_drawn(3)
    def test_a_session_has_no_dropout(self, data: st.DataObject | None) -> None:
        """A session's logits do not depend on whether a module is in training mode."""
        model, texts = self.model, self._texts(data)
        if not isinstance(model, nn.Module):
            pytest.skip("the model is no nn.Module, and so has no training mode")
        want = gptk.DecodeSession(model, texts).logits
        model.train()
        try:
            got = gptk.DecodeSession(model, texts).logits
        finally:
            model.eval()
        compare(got, want, f"logits after {texts} in training mode")

    @promise
    @worst_and_drawn(3)
    def test_it_decodes_the_same_in_every_way(self, data: st.DataObject | None) -> None:
        """The tokens are the same alone or in a batch, with or without a cache or a draft."""
        prompts, seed = self._texts(data, unique=True), _draw(data, 0, SEEDS, "seed")
        lm = gptk.LanguageModel(self.model)
        for sampler in _draw(
            data, _SAMPLERS, st.sampled_from(_SAMPLERS).map(lambda s: [s]), "sampler"
        ):
            run = functools.partial(decode, lm, sampler=sampler, seed=seed)
            alone = [run([prompt], ordinal=i)[0] for i, prompt in enumerate(prompts)]
            check(run(prompts) == alone, f"{prompts} give other tokens in a batch than alone")
            rows = without_numbers(decode_together(lm, prompts, sampler=sampler, seed=seed))
            best = [[results[:1] for results in each] for each in (rows, alone)]
            check(best[0] == best[1], f"{prompts} give other tokens as rows of one session")
            uncached = run(prompts, use_cache=False)
            check(uncached == alone, f"{prompts} give other tokens without the cache")
            if "beam" not in sampler:
                drafted = run(prompts, draft="lookup:ngram=1,tokens=3")
                check(drafted == alone, f"{prompts} give other tokens with a draft")

    def _texts(
        self,
        data: st.DataObject | None,
        *,
        rows: int = 0,
        equal: bool = False,
        unique: bool = False,
    ) -> list[list[int]]:
        """Token ids of `rows` rows (0: of one to four), a third of the window at most.

        Without data they are the first and the last token, repetitions, and unequal lengths.
        """
        most, size = max(1, longest(self.model) // 3), self.model.config.vocab_size
        if data is None:
            worst = [[1, 0, size - 1], [0], [size - 1] * 5, [2, 1, 2, 1, 2, 1, 2]]
            whole = [(text * 3)[:3] if equal else text for text in worst]
            trimmed = [[token % size for token in text[:most]] for text in whole]
            distinct = [list(text) for text in dict.fromkeys(map(tuple, trimmed))]
            return distinct if unique else trimmed[: rows or 4]
        length = data.draw(st.integers(1, most)) if equal else None
        row = st.lists(st.integers(0, size - 1), min_size=length or 1, max_size=length or most)
        texts: list[list[int]] = data.draw(
            st.lists(
                row, min_size=rows or 1, max_size=rows or 4, unique_by=tuple if unique else None
            ),
            label="texts",
        )
        return texts


def _draw(
    data: st.DataObject | None, worst: Drawn, strategy: st.SearchStrategy[Drawn], label: str
) -> Drawn:
    """What is drawn from data; without it the worst case, which was found by hand."""
    return worst if data is None else data.draw(strategy, label=label)


_SAMPLERS = ["greedy", "multinomial", "beam:width=2"]
_MOVES = st.lists(
    st.sampled_from(["read", "read", "select", "rewind", "clear"]), min_size=2, max_size=8
)
_WORST_MOVES = [
    "read",
    "select",
    "read",
    "rewind",
    "read",
    "select",
    "rewind",
    "read",
    "select",
    "select",
    "rewind",
    "rewind",
    "read",
    "rewind",
    "clear",
    "read",
    "select",
    "rewind",
]
