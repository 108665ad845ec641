"""Options that name tokens: by id, or by text that the model's tokenizer encodes."""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import Field

import gptk

TokenId = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]
TokensOrText = TokenId | Text | Annotated[tuple[TokenId, ...], Field(min_length=1)]
"""A token id, a text, or the ids of several tokens."""


def validated(
    plugin: type[gptk.Plugin],
    key: str,
    value: Any,
    validate: pydantic.ValidatorFunctionWrapHandler,
    form: str,
) -> Any:
    """The value of the option `key`, validated. form: what the message says is allowed.

    Raises OptionError if it is not valid.
    """
    try:
        return validate(value)
    except pydantic.ValidationError:
        raise gptk.OptionError(
            f"{plugin.title()}: {key}={gptk.plugins.shown(value)} is not allowed; {key} is {form}"
        ) from None


def as_pairs(value: Any) -> Any:
    """A mapping as the list of its pairs; anything else unchanged.

    Keys in JSON are always texts, so a key of digits is a token id.
    """
    if not isinstance(value, Mapping):
        return value
    return [(int(key) if _is_number(key) else key, item) for key, item in value.items()]


def _is_number(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit()


def token_ids(
    tokens: int | str | tuple[int, ...], plugin: gptk.Plugin, rows: gptk.Rows
) -> list[int]:
    """The ids of a token, of a text or of several tokens. No BOS is put before a text.

    Raises TokenizerError for a text if there is no tokenizer.
    """
    if isinstance(tokens, int):
        return [tokens]
    if isinstance(tokens, tuple):
        return list(tokens)
    tokenizer = rows.tokenizer
    if tokenizer is None:
        raise gptk.TokenizerError(
            f"{plugin.title()} needs the tokens of {tokens!r}, and the model comes without a "
            "tokenizer; name one, such as --tokenizer gpt2, or give token ids"
        )
    ids = tokenizer.encode(tokens)
    bos = tokenizer.bos if tokenizer.add_bos else None
    if bos is not None and not tokens.encode("utf-8", "replace").startswith(
        tokenizer.token_bytes(bos)
    ):
        ids = ids[1:]
    if not ids:
        raise gptk.OptionError(f"{plugin.title()}: the text {tokens!r} has no tokens")
    return ids


def single_token_id(token: int | str, plugin: gptk.Plugin, rows: gptk.Rows, *, instead: str) -> int:
    """The id of a token, or of a text that is one token.

    instead: the processor that the message names for a text of several tokens.
    """
    ids = token_ids(token, plugin, rows)
    if len(ids) > 1:
        raise gptk.OptionError(
            f"{plugin.title()} takes single tokens, and {token!r} is {len(ids)} tokens ({ids}); "
            f"{instead} takes several"
        )
    return ids[0]


def check_vocabulary(largest: int, size: int, plugin: gptk.Plugin) -> None:
    """Raises OptionError if the largest token id is not below the vocabulary's size."""
    if largest >= size:
        raise gptk.OptionError(
            f"{plugin.title()}: token {largest} is not in the model's vocabulary of {size}"
        )
