"""Speculative decoding: what a draft is (Leviathan et al. 2023, Chen et al. 2023).

A draft guesses the next tokens, the model reads all guesses in one pass, and the sampler then
chooses token by token. As long as it chooses what was guessed, the logits of the next token are
known already; at the first other choice the remaining guesses are dropped.

A row's random numbers are keyed by position, so each choice is the same as without a draft: the
text is the same, not merely the distribution ("drafter-invariant", Daliri et al. 2024). A draft
model draws its guesses with the row's random numbers, too, so that it often agrees.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.hooks.run import Run


class Draft(Protocol):
    """A drafter that has started on the rows of a run.

    If it is a `gptk.Follower`, too, it is told of every move of the rows.
    """

    def propose(self, run: "Run", count: int) -> "Tensor | None":
        """Guesses of each row's next tokens, (rows, at most `count`) int64.

        -1 in a row means that it has no guess from there on; None: there is no guess for any row.
        """
        raise NotImplementedError


class Drafter(Plugin):
    """Guesses tokens ahead of the model, for `--draft`."""

    kind: ClassVar[str] = "drafter"

    @classmethod
    def matches(cls, source: object) -> bool:
        """Whether it can draft with `source`, which is a model or a text that names no drafter.

        By default never: such a drafter is named by its spec string.
        """
        return False

    @classmethod
    def from_source(cls, source: object) -> "Drafter":
        """The drafter for a source that `matches`; by default its option `source` is it."""
        options: dict[str, Any] = {"source": source}  # a field that the subclass declares
        return cls(**options)

    def start(self, run: "Run") -> Draft:
        """Start on the rows of a run. Raises OptionError if it does not fit the model."""
        raise NotImplementedError(f"{type(self).__name__} does not define start()")
