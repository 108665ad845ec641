"""What plug-ins can read of the decoding run that they take part in, and do in it."""

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
    """One run of a sampler over the rows of a session, as plug-ins see it; see `gptk.Decoding`."""

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
        """What all processors make of other logits for the rows' next tokens, (rows, vocab)."""
        raise NotImplementedError

    def commit(self, choice: "Choice", *, extended: bool = False) -> None:
        """Make the choice: end the rows that end, and extend the session by the others.

        extended: the session has one row for each candidate, in their order, which already ends
        with its token; the rows are then only selected.
        """
        raise NotImplementedError

    def guess(self, next_logits: "Callable[[], Tensor]", count: int) -> "Tensor":
        """The next tokens that the sampler would choose by other logits: (rows, count).

        For drafts. next_logits: called for each token, once the session and its followers have
        moved by the tokens before it; in the end they are rewound. Returns (rows, vocab).
        """
        raise NotImplementedError
