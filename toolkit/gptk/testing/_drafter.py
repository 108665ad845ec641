"""The contract of drafters."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gptk
from gptk.testing._decoding import SEEDS, decode, lm_with_text
from gptk.testing._promises import PluginContract, check, examples, promise
from gptk.testing.models import batches


class DrafterContract(PluginContract):
    """What a drafter promises."""

    @promise
    @examples(6)
    @given(
        batch=batches(max_prompts=3),
        seed=SEEDS,
        sampler=st.sampled_from(["greedy", "multinomial", "mirostat"]),
    )
    def test_a_draft_changes_nothing(self, batch: list[list[int]], seed: int, sampler: str) -> None:
        """With the draft the tokens are those without it."""
        lm = lm_with_text()
        plain = decode(lm, batch, sampler=sampler, seed=seed)
        drafted = decode(lm, batch, sampler=sampler, seed=seed, draft=self.plugin())
        check(plain == drafted, f"{batch} give other tokens with the draft")

    @promise
    @examples(6)
    @given(batch=batches(max_prompts=3), seed=SEEDS)
    def test_guesses_are_tokens(self, batch: list[list[int]], seed: int) -> None:
        """`propose` returns (rows, at most count) int64: token ids, then -1 for no guess."""
        problems: list[str] = []
        draft = _Checked(drafter=self.plugin(), problems=problems)
        decode(lm_with_text(), batch, sampler="multinomial", seed=seed, draft=draft)
        check(not problems, problems[0] if problems else "")


class _Checked(gptk.Drafter):
    """A drafter whose guesses are checked."""

    name = "checked"
    drafter: Any
    problems: Any
    """A list, to which a message is added for each problem."""

    def start(self, run: gptk.Run) -> "_CheckedDraft":
        return _CheckedDraft(self.drafter.start(run), self.problems)


class _CheckedDraft:
    def __init__(self, draft: Any, problems: list[str]) -> None:
        self._draft, self._problems = draft, problems
        if isinstance(draft, gptk.Follower):
            self.extend, self.select, self.rewind = draft.extend, draft.select, draft.rewind

    def propose(self, run: gptk.Run, count: int) -> Tensor | None:
        guesses: Tensor | None = self._draft.propose(run, count)
        if guesses is not None:
            self._problems.extend(_problems(guesses, len(run.live), count))
        return guesses


def _problems(guesses: Tensor, rows: int, count: int) -> list[str]:
    """What is wrong with the guesses for `rows` rows, at most `count` for each."""
    vocabulary = lm_with_text().model.config.vocab_size
    if guesses.dtype != torch.int64 or guesses.dim() != 2 or len(guesses) != rows:
        return [f"guesses are {tuple(guesses.shape)} {guesses.dtype} for {rows} rows"]
    if guesses.shape[1] > count:
        return [f"there are {guesses.shape[1]} guesses where {count} were asked for"]
    if bool(((guesses < -1) | (guesses >= vocabulary)).any()):
        return [f"guesses {guesses.tolist()} are not all token ids"]
    if bool(((guesses[:, :-1] < 0) & (guesses[:, 1:] >= 0)).any()):
        return [f"guesses {guesses.tolist()} go on after a -1"]
    return []
