"""The contract of drafters."""

from typing import Any, ClassVar

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import gptk
from gptk.testing._decoding import (
    MANY,
    PROMPTS,
    SEEDS,
    Together,
    decode,
    decode_in_turns,
    decode_together,
    lm_with_text,
)
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, examples, instance, promise, undisturbed
from gptk.testing.models import batches

REPEATING = [[1, 2, 1, 2, 1, 2, 1], [97] * 12, *PROMPTS]
"""Prompts that also a drafter that looks for repetition has guesses for."""
SAMPLERS = ["greedy", "multinomial", "mirostat"]


class DrafterContract(PluginContract):
    """What a drafter promises."""

    _base: ClassVar[type] = gptk.Drafter

    @promise
    @examples(6)
    @given(batch=batches(max_prompts=3), seed=SEEDS)
    @example(batch=REPEATING, seed=0)
    @example(batch=REPEATING[:1], seed=1)
    def test_guesses_are_tokens(self, batch: list[list[int]], seed: int) -> None:
        """`propose` returns (rows, at most count) int64: token ids, then -1 for no guess."""
        for sampler in ("greedy", "multinomial"):
            problems: list[str] = []
            draft = _Checked(drafter=self.plugin(), problems=problems)
            settings: dict[str, Any] = {"max_new_tokens": 12, "seed": seed, "draft": draft}
            decode_together(lm_with_text(), batch, sampler=sampler, **settings)
            check(not problems, problems[0] if problems else "")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=3), seed=SEEDS)
    @example(batch=REPEATING, seed=0)
    def test_one_instance_serves_several_calls(self, batch: list[list[int]], seed: int) -> None:
        """An instance guesses what a new one guesses, after other calls and during others.

        What a drafter remembers of its rows belongs into the object that `start` returns. It does
        not use the global random generators.
        """
        with undisturbed():
            want = self._guessed(instance(self), batch, seed)
        other = self._guessed(instance(self), MANY[:5], seed)
        for _ in range(2):
            check(self._guessed(self.plugin(), batch, seed) == want, "used again it guesses others")
            again = self._guessed(self.plugin(), MANY[:5], seed)
            check(again == other, "used for other prompts it guesses others")
        plugin, guesses = self.plugin(), ([], [])  # type: ignore[var-annotated]
        calls = [
            Together(
                lm_with_text(),
                prompts,
                seed=seed,
                max_new_tokens=8,
                draft=_Recorded(drafter=plugin, guesses=list_),
            )
            for prompts, list_ in zip((batch, MANY[:5]), guesses, strict=True)
        ]
        decode_in_turns(calls)
        check(
            list(guesses) == [want, other],
            "in two calls that take turns it guesses others than in one after the other",
        )

    @promise
    @examples(4)
    @given(batch=batches(max_prompts=3), seed=SEEDS, sampler=st.sampled_from(SAMPLERS))
    @example(batch=REPEATING, seed=0, sampler="greedy")
    @example(batch=REPEATING, seed=1, sampler="multinomial")
    @example(batch=REPEATING[:1], seed=2, sampler="mirostat")
    def test_a_draft_changes_nothing(self, batch: list[list[int]], seed: int, sampler: str) -> None:
        """With the draft the tokens are those without it."""
        settings = {"sampler": sampler, "seed": seed, "max_new_tokens": 12}
        plain = decode(lm_with_text(), batch, **settings)
        drafted = decode(lm_with_text(), batch, **settings, draft=self.plugin())
        check(plain == drafted, f"{batch} give other tokens with the draft")
        rows = decode_together(lm_with_text(), batch, **settings)
        drafted_rows = decode_together(lm_with_text(), batch, **settings, draft=self.plugin())
        same = [r[0].tokens for r in rows] == [r[0].tokens for r in drafted_rows]
        check(same, f"{batch}, rows of one session, give other tokens with the draft")

    def _guessed(self, drafter: Any, batch: list[list[int]], seed: int) -> list[Any]:
        """All that it guesses in a run."""
        guesses: list[Any] = []
        draft = _Recorded(drafter=drafter, guesses=guesses)
        decode_together(lm_with_text(), batch, seed=seed, max_new_tokens=8, draft=draft)
        return guesses


class _Recorded(gptk.Drafter):
    """A drafter whose guesses are recorded."""

    name = "recorded"
    drafter: Any
    guesses: Any
    """A list, to which the guesses of each step are added."""

    def start(self, run: gptk.Run) -> "_Draft":
        return _Draft(self.drafter.start(run), self)

    def proposed(self, guesses: Tensor | None, rows: int, count: int) -> None:
        self.guesses.append(None if guesses is None else guesses.tolist())


class _Checked(gptk.Drafter):
    """A drafter whose guesses are checked."""

    name = "checked"
    drafter: Any
    problems: Any
    """A list, to which a message is added for each problem."""

    def start(self, run: gptk.Run) -> "_Draft":
        return _Draft(self.drafter.start(run), self)

    def proposed(self, guesses: Tensor | None, rows: int, count: int) -> None:
        self.problems.extend(_problems(guesses, rows, count))


class _Draft:
    def __init__(self, draft: Any, listener: _Recorded | _Checked) -> None:
        self._draft, self._listener = draft, listener
        if isinstance(draft, gptk.Follower):
            self.extend, self.select, self.rewind = draft.extend, draft.select, draft.rewind

    def propose(self, run: gptk.Run, count: int) -> Tensor | None:
        guesses: Tensor | None = self._draft.propose(run, count)
        self._listener.proposed(guesses, len(run.live), count)
        return guesses


def _problems(guesses: object, rows: int, count: int) -> list[str]:
    """What is wrong with the guesses for `rows` rows, at most `count` for each."""
    if guesses is None:
        return []
    if not isinstance(guesses, Tensor):
        return [f"guesses are {guesses!r:.60}, not a tensor"]
    vocabulary = lm_with_text().model.config.vocab_size
    if guesses.dtype != torch.int64 or guesses.dim() != 2 or len(guesses) != rows:
        return [f"guesses are {tuple(guesses.shape)} {guesses.dtype} for {rows} rows"]
    if guesses.shape[1] > count:
        return [f"there are {guesses.shape[1]} guesses where {count} were asked for"]
    unknown = ((guesses < -1) | (guesses >= vocabulary)).any(dim=1)
    if unknown.any():
        return [f"a row's guesses {guesses[unknown][0].tolist()} are not all token ids"]
    go_on = ((guesses[:, :-1] < 0) & (guesses[:, 1:] >= 0)).any(dim=1)
    if go_on.any():
        return [f"a row's guesses {guesses[go_on][0].tolist()} go on after a -1"]
    return []
