"""Speculative decoding: what a draft is (Leviathan et al. 2023, Chen et al. 2023).

A draft guesses the next tokens, the model reads all guesses in one pass, and the sampler then
decides token by token as ever. As long as it chooses what was guessed, the next logits are there
already; where it does not, the rest of the guesses is dropped.

A row's draws are keyed by position, so each choice is the one that would have been made without
a draft: the text is the same, not merely the distribution ("drafter-invariant", Daliri et al.
2024). A model that drafts draws its guesses by the row's own numbers, too, and so agrees often.
"""

from typing import TYPE_CHECKING, ClassVar, Protocol

from gptk.plugins import Plugin, create, find, provided
from gptk.spec import format_spec

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.decoding import Decoding
    from gptk.language_model import LanguageModel


class Draft(Protocol):
    """A drafter at work on the rows of one run; a `gptk.Follower` too if it remembers rows."""

    def propose(self, decoding: "Decoding", count: int) -> "Tensor | None":
        """Guesses of each row's next tokens, (rows, at most `count`) int64.

        -1 where there is none for a row (and none after it); None where there is none at all.
        """
        raise NotImplementedError


class Drafter(Plugin):
    """Guesses tokens ahead of the model, for `--draft`."""

    kind: ClassVar[str] = "drafter"

    def start(self, decoding: "Decoding") -> Draft:
        """The drafter at work. Raises OptionError if it does not fit the model."""
        raise NotImplementedError(f"{type(self).__name__} does not define start()")


def make_drafter(draft: "str | Drafter | LanguageModel") -> Drafter:
    """A drafter from a spec string, or from a model or what names one (the drafter `model`)."""
    if isinstance(draft, Drafter):
        return draft
    if not isinstance(draft, str):
        made = find("drafter", "model").item(source=draft)
        assert isinstance(made, Drafter)
        return made
    if draft.partition(":")[0] not in provided("drafter"):
        draft = format_spec("model", {"source": draft})
    return create("drafter", draft, Drafter)
