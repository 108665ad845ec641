"""What plug-ins may ask of the decoding run that they take part in."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.hooks.choice import Choice
    from gptk.hooks.results import Hypothesis
    from gptk.session.session import DecodeSession
    from gptk.text.tokenizer import Tokenizer


class Run(Protocol):
    """One run of a sampler over the rows of a session; `gptk.Decoding` is the one that is made."""

    state: object
    """What the sampler's `start` returned."""

    @property
    def session(self) -> "DecodeSession":
        """The model, its cache and the rows."""
        raise NotImplementedError

    @property
    def sampler(self) -> Plugin:
        """The sampler of this run."""
        raise NotImplementedError

    @property
    def processors(self) -> Sequence[Plugin]:
        """The logits processors in the order they work in, the sampler's own last."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """The model's tokenizer, if it has one."""
        raise NotImplementedError

    @property
    def live(self) -> "Sequence[Hypothesis]":
        """The hypotheses of the session's rows, in their order."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        raise NotImplementedError

    def processed_logits(self) -> "Tensor":
        """The logits after all processors, (rows, vocab) float32."""
        raise NotImplementedError

    def process(self, logits: "Tensor") -> "Tensor":
        """Any logits for the rows' next tokens after all processors. (rows, vocab) float32."""
        raise NotImplementedError

    def commit(self, choice: "Choice", *, extended: bool = False) -> None:
        """Make the choice: end the rows that end, and extend the session by the others.

        extended: the session's rows have their tokens already, so that parent i is the row
        that ends with candidate i, and the rows need only be selected.
        """
        raise NotImplementedError

    def guess(self, next_logits: "Callable[[], Tensor]", count: int) -> "Tensor":
        """What the sampler would choose were the logits those of `next_logits`: (rows, count).

        For drafts. All followers move along with the guesses, and in the end back.
        """
        raise NotImplementedError
