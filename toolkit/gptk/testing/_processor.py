"""The contract of logits processors."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
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
    worst_logits,
)
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, instance, promise, undisturbed, worst_and_drawn
from gptk.testing.models import batches, logits

Example = tuple[list[list[int]], Tensor]
"""Prompts, and logits for them, (rows, vocab)."""


class ProcessorContract(PluginContract):
    """What a logits processor promises."""

    _base: ClassVar[type] = gptk.LogitsProcessor
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
    @worst_and_drawn(12)
    def test_shape_dtype_and_device_are_kept(self, data: st.DataObject | None) -> None:
        """It returns (rows, vocab) float32 on the device of its input, without NaN and +inf."""
        for prompts, before in self._examples(data):
            after = self._process(before, prompts)
            check(isinstance(after, Tensor), f"it returns {after!r:.50}, not a tensor")
            check(
                after.shape == before.shape,
                f"it returns the shape {tuple(after.shape)} for {tuple(before.shape)}",
            )
            check(after.dtype == torch.float32, f"it returns {after.dtype}")
            check(after.device == before.device, f"it returns a tensor on {after.device}")
            wrong = after.isnan() | after.isposinf()
            check(not bool(wrong.any()), f"it returns NaN or +inf for {_shown(before, wrong)}")

    @promise
    @worst_and_drawn(12)
    def test_its_input_is_not_changed(self, data: st.DataObject | None) -> None:
        """Logits and rows stay as they were: others use the model's logits, too."""
        for prompts, passed in self._examples(data):
            before, rows = passed.clone(), self._rows(prompts)
            tokens, lengths = rows.tokens.clone(), tuple(rows.lengths)
            process = self.plugin().start(rows)
            process(passed, rows)
            check(torch.equal(passed, before), "it changed the logits in place")
            same = torch.equal(rows.tokens, tokens) and tuple(rows.lengths) == lengths
            check(same, "it changed the rows")

    @promise
    @worst_and_drawn(5)
    def test_equal_input_gives_equal_output(self, data: st.DataObject | None) -> None:
        """It is a function of rows and logits, and does not use the global random generators.

        It draws from `rows.uniform(draw=1)` and the like, whose numbers belong to the row.
        """
        for prompts, before in self._examples(data):
            with undisturbed():
                first = self._process(before, prompts, instance(self))
            torch.manual_seed(1)
            second = self._process(before, prompts, instance(self))
            check(alike(first, second), f"two equal calls give {difference(first, second)}")

    @promise
    @worst_and_drawn(3)
    def test_one_instance_serves_several_calls(self, data: st.DataObject | None) -> None:
        """An instance gives what a new one gives, after other calls and during others.

        What a processor remembers of its rows belongs into the object that `start` returns. An
        instance stays as it is made; it may serve several calls at once.
        """
        known = [self._history(rows, data) for rows in (2, 3)]
        want = [self._followed(instance(self), history) for history in known]
        for _ in range(2):
            for history, right in zip(known, want, strict=True):
                got = self._followed(self.plugin(), history)
                check(
                    alike(got, right),
                    f"used again it gives {difference(got, right)}, that time and the first time",
                )
        plugin, runs = self.plugin(), [self._rows(prompts) for prompts, _ in known]
        started = [(plugin.start(rows), rows) for rows in runs]
        for step in range(len(known[0][1]) + 1):
            for (process, rows), (_, steps), right in zip(started, known, want, strict=True):
                got = process(self._logits_of(rows), rows)
                if step == len(steps):
                    check(
                        alike(got, right),
                        f"two calls that take turns give {difference(got, right)}, and one after "
                        "the other",
                    )
                else:
                    self._extend(steps[step], rows, process)

    @promise
    @worst_and_drawn(12)
    def test_masked_tokens_stay_masked(self, data: st.DataObject | None) -> None:
        """A logit of -inf stays -inf.

        A token that an earlier processor or a constraint removed must not come back.
        """
        for prompts, before in self._examples(data):
            after = self._process(before, prompts)
            back = (before.isneginf() & ~after.isneginf()).nonzero().tolist()
            check(not back, f"token {back[0][1] if back else 0} came back from -inf")

    @promise
    @worst_and_drawn(8)
    def test_it_leaves_a_token(self, data: st.DataObject | None) -> None:
        """If no logit is masked, it leaves at least one; otherwise decoding could not go on."""
        for prompts, drawn in self._examples(data):
            before = drawn.clamp(min=-30)
            left = (~self._process(before, prompts).isneginf()).any(dim=1)
            check(bool(left.all()), f"it leaves no token of {_shown(before, ~left[:, None])}")

    @promise
    @worst_and_drawn(12)
    def test_rows_are_independent(self, data: st.DataObject | None) -> None:
        """A row gets the logits that it would get alone, whatever the other rows are.

        Otherwise a prompt's text depends on the batch that it happens to be in.
        """
        for prompts, before in self._examples(data, unique=True):
            together = self._process(before, prompts)
            for row, prompt in enumerate(prompts):
                alone = self._process(before[row : row + 1], [prompt])[0]
                check(
                    alike(together[row], alone),
                    f"row {row} of {prompts} gets {difference(together[row], alone)}, with the "
                    "others and alone",
                )

    @promise
    @worst_and_drawn(20)
    def test_its_state_follows_the_rows(self, data: st.DataObject | None) -> None:
        """After any moves of the rows it returns what it returns for rows that grew directly.

        Beams fork and drop rows, drafts take tokens back: what `start` returned must follow
        `extend`, `select` and `rewind`.
        """
        if data is None:
            for moves in _WORST_MOVES:
                for count in range(1, len(moves) + 1):  # a later move may hide a fault
                    self._check_moves([[0], [1, 1, 2]], moves[:count])
            return
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        self._check_moves(prompts, data.draw(_MOVES, label="moves"), data)

    @promise
    @worst_and_drawn(3)
    def test_it_decodes_the_same_in_every_way(self, data: st.DataObject | None) -> None:
        """The tokens are the same alone or in a batch, with or without a cache or a draft."""
        if data is None:
            for sampler in _SAMPLERS:
                self._check_ways([[0], [1, 2, 1, 2, 1], [3, 3, 3]], sampler, 0)
            return
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        sampler = data.draw(st.sampled_from(_SAMPLERS))
        self._check_ways(prompts, sampler, data.draw(SEEDS, label="seed"))

    def _check_ways(self, prompts: list[list[int]], sampler: str, seed: int) -> None:
        def run(batch: list[list[int]], **more: Any) -> list[Any]:
            return decode(
                self.lm, batch, sampler=sampler, processors=[self.plugin()], seed=seed, **more
            )

        alone = [run([prompt], ordinal=i)[0] for i, prompt in enumerate(prompts)]
        if not any(isinstance(result, str) for result in alone):  # an error ends the whole batch
            check(run(prompts) == alone, f"{prompts} give other tokens in a batch than alone")
        for i, (prompt, want) in enumerate(zip(prompts, alone, strict=True)):
            check(
                run([prompt], ordinal=i, use_cache=False) == [want],
                f"{prompt} gives other tokens without the cache",
            )
            if "beam" not in sampler:
                check(
                    run([prompt], ordinal=i, draft="lookup:ngram=1,tokens=3") == [want],
                    f"{prompt} gives other tokens with a draft",
                )

    def _check_moves(
        self, prompts: list[list[int]], moves: Sequence[Any], data: st.DataObject | None = None
    ) -> None:
        """Compare, after the moves, each row with one that grew directly.

        moves: the names of moves whose arguments are drawn from data; without it, pairs of the
        name and the arguments.
        """
        rows = self._rows(prompts)
        process = self.plugin().start(rows)
        followers: list[gptk.Follower] = [rows]
        followers += [process] if isinstance(process, gptk.Follower) else []
        for move in moves:
            process(self._logits_of(rows), rows)
            name, argument = move if data is None else (move, self._argument(move, data, rows))
            if name == "extend":
                argument = torch.tensor(argument)[:, : None if self.several_at_once else 1]
            for follower in followers:
                getattr(follower, name)(argument)
        after = process(self._logits_of(rows), rows)
        for row, prompt in enumerate(rows.prompts):
            start, end = rows.prompt_lengths[row], rows.lengths[row]
            tokens = rows.tokens[row, start:end].tolist()
            history = [prompts[prompt]], [[[token]] for token in tokens]
            want = self._followed(self.plugin(), history)[0]
            check(
                alike(after[row], want),
                f"row {row} gets {difference(after[row], want)}, after these moves and directly",
            )

    def _argument(self, move: str, data: st.DataObject, rows: gptk.Rows) -> Any:
        """The argument of an `extend`, `select` or `rewind`, drawn from data."""
        size = len(rows)
        if move == "extend":
            # Mostly few tokens, so that they repeat.
            token = st.integers(0, 2) | st.integers(0, self.lm.model.config.vocab_size - 1)
            count = data.draw(st.integers(1, 3)) if self.several_at_once else 1
            row = st.lists(token, min_size=count, max_size=count)
            return data.draw(st.lists(row, min_size=size, max_size=size), label="extend")
        if move == "select":
            parents = data.draw(
                st.lists(st.integers(0, size - 1), min_size=1, max_size=4), label="select"
            )
            # In any order within a prompt; the rows of a prompt stay adjacent.
            return sorted(parents, key=lambda parent: rows.prompts[parent])
        new = [a - b for a, b in zip(rows.lengths, rows.prompt_lengths, strict=True)]
        return [data.draw(st.integers(0, most), label="rewind") for most in new]

    def _followed(self, plugin: Any, history: "History") -> Tensor:
        """The processed logits, (rows, vocab), of rows that are extended step by step."""
        prompts, steps = history
        rows = self._rows(prompts)
        process = plugin.start(rows)
        for tokens in steps:
            process(self._logits_of(rows), rows)
            self._extend(tokens, rows, process)
        after: Tensor = process(self._logits_of(rows), rows)
        return after

    def _extend(self, tokens: list[list[int]], rows: gptk.Rows, process: Any) -> None:
        for follower in (rows, process):
            if isinstance(follower, gptk.Follower):
                follower.extend(torch.tensor(tokens))

    def _history(self, rows: int, data: st.DataObject | None) -> "History":
        """Prompts of that many rows, and the tokens of five steps."""
        if data is None:
            prompts = [[0], [1, 1, 2], [2, 1]][:rows]
            return prompts, [[[(step * row + 1) % 4] for row in range(rows)] for step in range(5)]
        token = st.integers(0, min(self.lm.model.config.vocab_size, 256) - 1)
        prompt = st.lists(token, min_size=1, max_size=6)
        step = st.lists(st.tuples(token).map(list), min_size=rows, max_size=rows)
        return (
            data.draw(st.lists(prompt, min_size=rows, max_size=rows), label="prompts"),
            data.draw(st.lists(step, min_size=5, max_size=5), label="tokens"),
        )

    def _examples(self, data: st.DataObject | None, *, unique: bool = False) -> Iterator[Example]:
        """The examples built by hand, or one that is drawn.

        By hand: each kind of difficult logits in a row of its own, in a single batch, and alone.
        """
        if data is not None:
            prompts = data.draw(self._prompts(unique=unique), label="prompts")
            yield prompts, data.draw(self._logits(len(prompts)), label="logits")
            return
        worst = worst_logits(self.lm.model.config.vocab_size)
        prompts = [[row % 4] * (row % 3) + [row] for row in range(len(worst))]
        yield prompts, torch.stack(worst)
        yield from (([[1, 2, 1, 2]], row[None]) for row in worst)

    def _rows(self, prompts: list[list[int]]) -> gptk.Rows:
        tokenizer = tokenizer_of(self.lm)
        eos = () if tokenizer is None else tokenizer.eos
        return gptk.Rows(
            prompts,
            eos=eos,
            tokenizer=tokenizer,
            model=self.lm.model,
            ordinals=[0] * len(prompts),  # so that a row draws beside others what it draws alone
        )

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

    def _process(self, before: Tensor, prompts: list[list[int]], plugin: Any = None) -> Tensor:
        rows = self._rows(prompts)
        process = (self.plugin() if plugin is None else plugin).start(rows)
        after: Tensor = process(before.clone(), rows)
        return after


History = tuple[list[list[int]], list[list[list[int]]]]
"""Prompts, and for each step the token of each row, (rows, 1)."""

_SAMPLERS = ["greedy", "multinomial", "beam:width=2"]

_WORST_MOVES: list[list[tuple[str, Any]]] = [
    [("extend", [[1], [2]]), ("extend", [[1], [1]])],
    [
        *(("extend", [[1], [2]]), ("select", [0, 0, 1])),  # forks
        *(("extend", [[2], [1], [1]]), ("select", [1, 0, 2])),  # in another order
        *(("extend", [[1], [0], [1]]), ("select", [0, 0, 2])),  # a fork in place of another
        *(("extend", [[0], [1], [2]]), ("select", [2])),  # a single row is left
        ("extend", [[1]]),
    ],
    [
        *(("extend", [[1, 1, 0], [2, 1, 1]]), ("rewind", [2, 0])),  # unequal counts
        *(("extend", [[2, 1], [1, 2]]), ("rewind", [1, 2])),
        *(("select", [1, 1]), ("extend", [[1], [0]]), ("rewind", [0, 1])),
        ("extend", [[1], [1]]),
    ],
    [("extend", [[1], [1]]), ("rewind", [1, 1]), ("extend", [[2], [2]])],
]
"""Moves by which beams fork and prune, and drafts take tokens back."""

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


def _shown(logits: Tensor, wrong: Tensor) -> str:
    """The logits of the first row that is wrong in an element. wrong: (rows, …) bool."""
    row = int(wrong.any(dim=1).nonzero()[0]) if bool(wrong.any()) else 0
    numbers = [round(value, 4) for value in logits[row, :12].tolist()]
    return f"{numbers}" if logits.shape[1] <= 12 else f"{numbers[:-1]}…"
