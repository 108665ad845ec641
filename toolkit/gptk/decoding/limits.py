"""What ends a row: an end-of-text token, stop strings and conditions, limits on length and time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptk.hooks.results import FinishReason, Hypothesis, TopTokens
from gptk.plugins.blame import callers_code
from gptk.session.session import DecodeSession
from gptk.text.tokenizer import Tokenizer

StopCondition = Callable[[list[int]], bool]
"""A function of a row's tokens, prompt first: whether the row ends after the last of them."""


@dataclass(frozen=True)
class Limits:
    """What ends a row."""

    max_new_tokens: int
    eos: tuple[int, ...] = ()
    stop: tuple[bytes, ...] = ()
    conditions: tuple[StopCondition, ...] = ()
    deadline: float | None = None
    """In seconds of `time.monotonic`."""

    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True)
class Extender:
    """Extends the hypotheses of a session's rows, and says which of them end."""

    session: DecodeSession
    limits: Limits
    tokenizer: Tokenizer | None

    def extend(
        self,
        row: Hypothesis,
        index: int,
        token: int,
        *,
        logprob: float,
        score: float,
        limit: int,
        late: bool,
        top: TopTokens | None = None,
    ) -> Hypothesis:
        """The hypothesis `row` with one more token.

        index: the session's row that holds its tokens. limit: the most new tokens it may have.
        late: the deadline has passed. top: the likeliest tokens at this step.
        """
        tail, stopped = self._tail(row, token)
        stopped = stopped or self._meets_condition(row, index, token)
        reason: FinishReason | None = None
        if token in self.limits.eos:
            reason = "eos"
        elif stopped:
            reason = "stop"
        elif row.length + 1 >= limit:
            reason = "length"
        elif late:
            reason = "time"
        return Hypothesis(
            prompt=row.prompt,
            sample=row.sample,
            group=row.group,
            parent=row,
            token=token,
            logprob=logprob,
            total=row.total + logprob,
            score=score,
            length=row.length + 1,
            tail=tail,
            reason=reason,
            top=top,
        )

    def _tail(self, row: Hypothesis, token: int) -> tuple[bytes, bool]:
        """The end of the text, in which a stop string may begin; and whether it holds one."""
        stop = self.limits.stop
        if not stop or self.tokenizer is None:
            return row.tail, False
        text = row.tail + self.tokenizer.token_bytes(token)
        keep = max(map(len, stop)) - 1
        return text[max(len(text) - keep, 0) :], any(string in text for string in stop)

    def _meets_condition(self, row: Hypothesis, index: int, token: int) -> bool:
        if not self.limits.conditions:
            return False
        rows = self.session.rows
        tokens = rows.session_tokens[index, : rows.prompt_lengths[index] + row.length].tolist()
        return _any_holds(self.limits.conditions, [*tokens, token])


def _any_holds(conditions: Sequence[StopCondition], tokens: list[int]) -> bool:
    with callers_code():
        return any(condition(tokens) for condition in conditions)
