"""Prompts: from a text or token ids to token ids that the model has."""

import operator
from collections.abc import Sequence

from gptk.errors import PromptError, counted
from gptk.model.protocol import ModelConfig
from gptk.session.session import Overflow
from gptk.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A text, or token ids."""


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text; an empty text becomes the tokenizer's start token.

    Raises PromptError if the text is empty and there is no such token, or if it has half of a
    surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt has half of a surrogate pair at character {error.start + 1}; "
            "it is not the text of a UTF-8 file"
        ) from None
    ids = tokenizer.encode(text)
    if ids:
        return ids
    if tokenizer.start is None:
        raise PromptError("the prompt is empty and the model has no token to begin with")
    return [tokenizer.start]


def read_ids(prompt: Sequence[int]) -> list[int]:
    """Token ids as a list of ints; numpy's and torch's integers serve too. Raises PromptError."""
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise PromptError(
            f"a prompt is a text or a list of token ids, not {prompt!r:.80}"
        ) from None
    if not ids:
        raise PromptError("the prompt has no tokens")
    return ids


def check_vocabulary(ids: Sequence[int], config: ModelConfig) -> None:
    """Raises PromptError for a token that the model does not have."""
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise PromptError(
                f"token {token} is not in the model's vocabulary of {config.vocab_size}"
            )


def check_pair(
    context: list[int], continuation: Sequence[int], config: ModelConfig
) -> tuple[list[int], list[int]]:
    """A context and its continuation, which may be empty, as lists of ints.

    Raises PromptError if the model cannot read them together; the last token is only predicted.
    """
    new = read_ids(continuation) if len(continuation) else []
    check_vocabulary(new, config)
    if len(context) + len(new) - 1 > config.context_length:
        raise PromptError(
            f"a context of {counted(len(context), 'token')} and a continuation of {len(new)} do "
            f"not fit into the model's window of {config.context_length}"
        )
    return context, new


def check_length(prompt: Sequence[int], config: ModelConfig, overflow: Overflow) -> None:
    """Raises PromptError if a prompt fills the model's window and may not overflow it."""
    window = config.context_length
    if len(prompt) >= window and overflow == "stop":
        raise PromptError(
            f"the prompt has {counted(len(prompt), 'token')} and the model's window is {window}, "
            "prompt and new tokens together; shorten it, or use overflow slide to keep its end"
        )
