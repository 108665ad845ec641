"""Requests: prompts with settings of their own; and responses, in the order in which they end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptk.decoding.prompts import Prompt
from gptk.errors import PromptError
from gptk.hooks.results import Generation, shortened

if TYPE_CHECKING:
    from gptk.text.chat import Message


@dataclass(frozen=True, repr=False)
class Request:
    """A prompt, or the messages of a conversation, with settings of its own.

    Raises PromptError if it has both a prompt and messages.
    """

    prompt: Prompt = ""
    """A text or token ids; an empty text starts from the model's BOS or end-of-text token."""
    messages: "Sequence[Message] | None" = None
    """Instead of a prompt: a conversation, of which the model's chat template makes the prompt."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `LanguageModel.generate` that differ from those of the call."""
    id: Any = None
    """Anything that tells the caller which request it is; the response has it, too."""
    ordinal: int | None = None
    """The number that its random stream depends on [its place in the call, plus the setting
    `ordinal` of the call]."""

    def __post_init__(self) -> None:
        if self.messages is not None and (not isinstance(self.prompt, str) or self.prompt):
            raise PromptError("a request has a prompt or messages, not both")

    def __repr__(self) -> str:
        what = f"{len(self.messages)} messages" if self.messages is not None else self.prompt
        if not isinstance(what, str):
            what = f"{len(what)} tokens"
        others = "".join(f", {key}={value!r:.60}" for key, value in self.settings.items())
        named = "" if self.id is None else f", id={self.id!r:.60}"
        numbered = "" if self.ordinal is None else f", ordinal={self.ordinal}"
        return f"Request({shortened(what)}{named}{numbered}{others})"


@dataclass(frozen=True)
class Response:
    """What a request came to: a generation, or the error that ended it."""

    index: int
    """The place of the request in the call, from 0."""
    request: Request
    generation: Generation | None = None
    error: Exception | None = None
    """A GptkError, or what a function that the caller passed has raised. The other requests of the
    call are not affected."""
