"""The logits by which the sampler chooses, kept for those who look at them after the choice."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from gptk import vocabulary
from gptk.hooks.results import RankedToken, TopTokens


@dataclass(frozen=True)
class ChoiceLogits:
    """The logits of a choice."""

    logits: Tensor
    """(rows, vocab): before the processors."""
    processed: Tensor
    """(rows, vocab): after the processors."""
    removed: dict[str, Tensor]
    """How many tokens each processor took out of each row, (rows,) by name."""

    def top(self, k: int) -> list[TopTokens]:
        """For each row the k likeliest tokens, before and after the processors."""
        before = _likeliest(self.logits, k)
        after = before if self.processed is self.logits else _likeliest(self.processed, k)
        return [TopTokens(*pair) for pair in zip(before, after, strict=True)]


class Observed:
    """Keeps the logits of the next choice.

    A strategy may look ahead, or process logits twice. The logits of the choice are those that are
    processed first while the rows have the lengths that they have at the choice.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._kept: ChoiceLogits | None = None
        self._lengths_at_choice = tuple(lengths)
        """The lengths of the rows for whose next tokens the sampler chooses."""

    def keep(
        self,
        lengths: Sequence[int],
        logits: Tensor,
        processed: Tensor,
        removed: dict[str, Tensor],
    ) -> None:
        """Keep copies of logits and of what processors made of them, if they are the choice's.

        Copies, because the sampler may write into what it gets.
        """
        if self._kept is None and tuple(lengths) == self._lengths_at_choice:
            before = logits.clone()
            after = before if processed is logits else processed.clone()
            self._kept = ChoiceLogits(before, after, removed)

    @contextlib.contextmanager
    def ignoring(self) -> Iterator[None]:
        """Within the block, `keep` keeps nothing."""
        lengths, self._lengths_at_choice = self._lengths_at_choice, ()
        try:
            yield
        finally:
            self._lengths_at_choice = lengths

    def take(self) -> ChoiceLogits | None:
        """The logits of the choice, which are then forgotten; None if none were processed."""
        kept, self._kept = self._kept, None
        return kept

    def moved(self, lengths: Sequence[int]) -> None:
        """The rows have moved: these are their lengths at the next choice."""
        self._lengths_at_choice = tuple(lengths)


def _likeliest(logits: Tensor, k: int) -> list[tuple[RankedToken, ...]]:
    """For each row of logits the k likeliest tokens; fewer where fewer are possible."""
    top = vocabulary.top(logits, min(k, logits.shape[-1]))
    logprobs = vocabulary.logprobs_of(top.values, logits).tolist()
    return [
        tuple(
            RankedToken(token, logprob)
            for token, logprob in zip(tokens, of_row, strict=True)
            if logprob > float("-inf")  # nor NaN
        )
        for tokens, of_row in zip(top.tokens.tolist(), logprobs, strict=True)
    ]
