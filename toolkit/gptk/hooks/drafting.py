"""Speculative decoding: what a draft is (Leviathan et al. 2023, Chen et al. 2023).

A draft guesses the next tokens, the model reads all guesses in one pass, and the sampler then
decides token by token as ever. As long as it chooses what was guessed, the next logits are there
already; where it does not, the rest of the guesses is dropped.

A row's draws are keyed by position, so each choice is the one that would have been made without
a draft: the text is the same, not merely the distribution ("drafter-invariant", Daliri et al.
2024). A model that drafts draws its guesses by the row's own numbers, too, and so agrees often.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.hooks.run import Run


class Draft(Protocol):
    """A drafter at work on the rows of one run; a `gptk.Follower` too if it remembers rows."""

    def propose(self, run: "Run", count: int) -> "Tensor | None":
        """Guesses of each row's next tokens, (rows, at most `count`) int64.

        -1 where there is none for a row (and none after it); None where there is none at all.
        """
        raise NotImplementedError


class Drafter(Plugin):
    """Guesses tokens ahead of the model, for `--draft`."""

    kind: ClassVar[str] = "drafter"

    @classmethod
    def matches(cls, source: object) -> bool:
        """Whether it can draft by `source`, which is a model or a text that names no drafter.

        By default never: such a drafter is named by its spec string.
        """
        return False

    @classmethod
    def from_source(cls, source: object) -> "Drafter":
        """The drafter for a source that `matches`; by default its option `source` is the source."""
        options: dict[str, Any] = {"source": source}  # a field of the drafter's own
        return cls(**options)

    def start(self, run: "Run") -> Draft:
        """The drafter at work. Raises OptionError if it does not fit the model."""
        raise NotImplementedError(f"{type(self).__name__} does not define start()")
