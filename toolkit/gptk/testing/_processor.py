"""The contract of logits processors."""

from typing import Any, ClassVar

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gptk
from gptk.testing._decoding import (
    SEEDS,
    alike,
    decode,
    difference,
    lm_with_text,
    lm_without_text,
    random_logits,
    tokenizer_of,
)
from gptk.testing._promises import PluginContract, check, examples, promise, undisturbed
from gptk.testing.models import batches, logits


class ProcessorContract(PluginContract):
    """What a logits processor promises."""

    vocabulary: ClassVar[int] = 12
    """How many tokens the tests' logits have. Few tokens make examples easy to read."""
    needs_text: ClassVar[bool] = False
    """It needs the text of tokens: the tests then have 256 bytes and an end of text as tokens."""
    several_at_once: ClassVar[bool] = True
    """Its state is the same whether tokens come one by one or several at a time. Set it to False
    for a processor that learns from the distribution that each token was drawn from."""

    @property
    def lm(self) -> gptk.LanguageModel:
        """The model whose rows are processed."""
        return lm_with_text() if self.needs_text else lm_without_text(self.vocabulary)

    @promise
    @examples(12)
    @given(data=st.data())
    def test_rows_are_independent(self, data: st.DataObject) -> None:
        """A row gets the logits that it would get alone, whatever the other rows are.

        Otherwise a prompt's text depends on the batch that it happens to be in.
        """
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        before = data.draw(self._logits(len(prompts)), label="logits")
        together = self._process(before, prompts)
        for row, prompt in enumerate(prompts):
            alone = self._process(before[row : row + 1], [prompt])[0]
            check(
                alike(together[row], alone),
                f"row {row} of {prompts} gets {difference(together[row], alone)}, with the others "
                "and alone",
            )

    @promise
    @examples(12)
    @given(data=st.data())
    def test_masked_tokens_stay_masked(self, data: st.DataObject) -> None:
        """A logit of -inf stays -inf.

        A token that an earlier processor or a constraint removed must not come back.
        """
        prompts = data.draw(self._prompts(), label="prompts")
        before = data.draw(self._logits(len(prompts)), label="logits")
        after = self._process(before, prompts)
        back = (before.isneginf() & ~after.isneginf()).nonzero().tolist()
        check(not back, f"token {back[0][1] if back else 0} came back from -inf")

    @promise
    @examples(12)
    @given(data=st.data())
    def test_its_input_is_not_changed(self, data: st.DataObject) -> None:
        """Logits and rows stay as they were: others use the model's logits, too."""
        prompts = data.draw(self._prompts(), label="prompts")
        passed = data.draw(self._logits(len(prompts)), label="logits")
        before, rows = passed.clone(), self._rows(prompts)
        tokens, lengths = rows.tokens.clone(), tuple(rows.lengths)
        process = self.plugin().start(rows)
        process(passed, rows)
        check(torch.equal(passed, before), "it changed the logits in place")
        same = torch.equal(rows.tokens, tokens) and tuple(rows.lengths) == lengths
        check(same, "it changed the rows")

    @promise
    @examples(12)
    @given(data=st.data())
    def test_shape_dtype_and_device_are_kept(self, data: st.DataObject) -> None:
        """It returns (rows, vocab) float32 on the device of its input, without NaN and +inf."""
        prompts = data.draw(self._prompts(), label="prompts")
        before = data.draw(self._logits(len(prompts)), label="logits")
        after = self._process(before, prompts)
        check(isinstance(after, Tensor), f"it returns {after!r:.50}, not a tensor")
        check(
            after.shape == before.shape,
            f"it returns the shape {tuple(after.shape)} for {tuple(before.shape)}",
        )
        check(after.dtype == torch.float32, f"it returns {after.dtype}")
        check(after.device == before.device, f"it returns a tensor on {after.device}")
        check(not bool((after.isnan() | after.isposinf()).any()), "it returns NaN or +inf")

    @promise
    @examples(8)
    @given(data=st.data())
    def test_it_leaves_a_token(self, data: st.DataObject) -> None:
        """If no logit is masked, it leaves at least one; otherwise decoding could not go on."""
        prompts = data.draw(self._prompts(), label="prompts")
        before = data.draw(self._logits(len(prompts)), label="logits").clamp(min=-30)
        after = self._process(before, prompts)
        check(bool((~after.isneginf()).any(dim=1).all()), "it leaves a row without a token")

    @promise
    @examples(5)
    @given(data=st.data())
    def test_equal_input_gives_equal_output(self, data: st.DataObject) -> None:
        """It is a function of rows and logits, and does not use the global random generators.

        It draws from `rows.uniform(draw=1)` and the like, whose numbers belong to the row.
        """
        prompts = data.draw(self._prompts(), label="prompts")
        before = data.draw(self._logits(len(prompts)), label="logits")
        with undisturbed():
            first = self._process(before, prompts)
        torch.manual_seed(1)
        second = self._process(before, prompts)
        check(alike(first, second), f"two equal calls give {difference(first, second)}")

    @promise
    @examples(25)
    @given(data=st.data())
    def test_its_state_follows_the_rows(self, data: st.DataObject) -> None:
        """After any moves of the rows it returns what it returns for rows that grew directly.

        Beams fork and drop rows, drafts take tokens back: what `start` returned must follow
        `extend`, `select` and `rewind`.
        """
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        rows = self._rows(prompts)
        process = self.plugin().start(rows)
        followers: list[gptk.Follower] = [rows]
        followers += [process] if isinstance(process, gptk.Follower) else []
        for move in data.draw(_MOVES, label="moves"):
            process(self._logits_of(rows), rows)
            self._move(move, data, rows, followers)
        after = process(self._logits_of(rows), rows)
        for row, prompt in enumerate(rows.prompts):
            start, end = rows.prompt_lengths[row], rows.lengths[row]
            want = self._direct(prompts[prompt], rows.tokens[row, start:end].tolist())
            check(
                alike(after[row], want),
                f"row {row} gets {difference(after[row], want)}, after these moves and directly",
            )

    @promise
    @examples(3)
    @given(data=st.data())
    def test_it_decodes_the_same_in_every_way(self, data: st.DataObject) -> None:
        """The tokens are the same alone or in a batch, with or without a cache or a draft."""
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        sampler = data.draw(st.sampled_from(["greedy", "multinomial", "beam:width=2"]))
        seed = data.draw(SEEDS, label="seed")

        def run(batch: list[list[int]], **more: Any) -> list[Any]:
            return decode(
                self.lm, batch, sampler=sampler, processors=[self.plugin()], seed=seed, **more
            )

        alone = [run([prompt])[0] for prompt in prompts]
        if not any(isinstance(result, str) for result in alone):  # an error ends the whole batch
            check(run(prompts) == alone, f"{prompts} give other tokens in a batch than alone")
        check(
            run(prompts[:1], use_cache=False) == alone[:1],
            f"{prompts[0]} gives other tokens without the cache",
        )
        if "beam" not in sampler:
            check(
                run(prompts[:1], draft="lookup:ngram=1,tokens=3") == alone[:1],
                f"{prompts[0]} gives other tokens with a draft",
            )

    def _move(
        self, move: str, data: st.DataObject, rows: gptk.Rows, followers: list[gptk.Follower]
    ) -> None:
        """Draw the arguments of an `extend`, `select` or `rewind`, and call it on all followers."""
        size = len(rows)
        if move == "extend":
            # Mostly few tokens, so that they repeat.
            token = st.integers(0, 2) | st.integers(0, self.lm.model.config.vocab_size - 1)
            count = data.draw(st.integers(1, 3)) if self.several_at_once else 1
            row = st.lists(token, min_size=count, max_size=count)
            tokens = data.draw(st.lists(row, min_size=size, max_size=size), label="extend")
            for follower in followers:
                follower.extend(torch.tensor(tokens))
        elif move == "select":
            parents = data.draw(
                st.lists(st.integers(0, size - 1), min_size=1, max_size=4), label="select"
            )
            # In any order within a prompt; the rows of a prompt stay adjacent.
            parents = sorted(parents, key=lambda parent: rows.prompts[parent])
            for follower in followers:
                follower.select(parents)
        else:
            new = [a - b for a, b in zip(rows.lengths, rows.prompt_lengths, strict=True)]
            counts = [data.draw(st.integers(0, most), label="rewind") for most in new]
            for follower in followers:
                follower.rewind(counts)

    def _direct(self, prompt: list[int], tokens: list[int]) -> Tensor:
        """The processed logits, (vocab,), of a single row that is extended token by token."""
        rows = self._rows([prompt])
        process = self.plugin().start(rows)
        for token in tokens:
            process(self._logits_of(rows), rows)
            for follower in (rows, process):
                if isinstance(follower, gptk.Follower):
                    follower.extend(torch.tensor([[token]]))
        after: Tensor = process(self._logits_of(rows), rows)
        return after[0]

    def _rows(self, prompts: list[list[int]]) -> gptk.Rows:
        tokenizer = tokenizer_of(self.lm)
        eos = () if tokenizer is None else tokenizer.eos
        return gptk.Rows(prompts, seed=0, eos=eos, tokenizer=tokenizer, model=self.lm.model)

    def _prompts(self, *, unique: bool = False) -> st.SearchStrategy[list[list[int]]]:
        return batches(min(self.lm.model.config.vocab_size, 256), 3, unique=unique)

    def _logits(self, rows: int) -> st.SearchStrategy[Tensor]:
        size = self.lm.model.config.vocab_size
        if size <= 40:
            return logits(rows, size)
        return st.builds(random_logits, st.just(rows), st.just(size), SEEDS, st.floats(0.1, 8))

    def _logits_of(self, rows: gptk.Rows) -> Tensor:
        """Logits that are a function of a row's tokens."""
        size = self.lm.model.config.vocab_size
        drawn = []
        for row, length in enumerate(rows.lengths):
            key = hash(tuple(rows.tokens[row, :length].tolist())) % 2**32
            drawn.append(random_logits(1, size, key, 3.0))
        return torch.cat(drawn)

    def _process(self, before: Tensor, prompts: list[list[int]]) -> Tensor:
        rows = self._rows(prompts)
        after: Tensor = self.plugin().start(rows)(before.clone(), rows)
        return after


_FORKS: list[list[str]] = [
    [],
    ["select", "extend", "select"],
    ["select", "extend", "select", "extend", "select"],
]
"""Beams fork rows and then reorder the forks; among random moves that is rare."""
_MOVES = st.builds(
    list.__add__,
    st.sampled_from(_FORKS),
    st.lists(
        st.sampled_from(["extend", "extend", "extend", "select", "rewind"]), min_size=2, max_size=8
    ),
)
