"""Options that name tokens: ids, or texts that the model's tokenizer makes ids of."""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import Field

import gptk

Token = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]
Word = Token | Text | Annotated[tuple[Token, ...], Field(min_length=1)]
"""One token, a text, or the ids of several tokens."""


def explained(
    plugin: type[gptk.Plugin],
    key: str,
    given: Any,
    validate: pydantic.ValidatorFunctionWrapHandler,
    form: str,
) -> Any:
    """A list option validated; raises OptionError that shows the form which a list has."""
    try:
        return validate(given)
    except pydantic.ValidationError:
        shown = repr(given) if len(repr(given)) < 80 else f"{repr(given)[:80]}…"
        raise gptk.OptionError(
            f"{plugin.title()}: {key}={shown} is not allowed; {key} is {form}"
        ) from None


def pairs(given: Any) -> Any:
    """A mapping as the list of its pairs. JSON has no keys but texts: one of digits is an id."""
    if not isinstance(given, Mapping):
        return given
    return [(int(key) if _is_number(key) else key, value) for key, value in given.items()]


def _is_number(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit()


def ids_of(word: int | str | tuple[int, ...], plugin: gptk.Plugin, rows: gptk.Rows) -> list[int]:
    """The token ids of a word. A text gets no BOS in front, as it stands within a text.

    Raises TokenizerError for a text where there is no tokenizer.
    """
    if isinstance(word, int):
        return [word]
    if isinstance(word, tuple):
        return list(word)
    tokenizer = rows.tokenizer
    if tokenizer is None:
        raise gptk.TokenizerError(
            f"{plugin.title()} needs the tokens of {word!r}, and the model comes without a "
            "tokenizer; name one, such as --tokenizer gpt2, or give token ids"
        )
    ids = tokenizer.encode(word)
    bos = tokenizer.bos if tokenizer.add_bos else None
    if bos is not None and not word.encode("utf-8", "replace").startswith(
        tokenizer.token_bytes(bos)
    ):
        ids = ids[1:]
    if not ids:
        raise gptk.OptionError(f"{plugin.title()}: the text {word!r} has no tokens")
    return ids


def id_of(word: int | str, plugin: gptk.Plugin, rows: gptk.Rows, *, instead: str) -> int:
    """The id of a word that is one token. instead: the processor for several tokens."""
    ids = ids_of(word, plugin, rows)
    if len(ids) > 1:
        raise gptk.OptionError(
            f"{plugin.title()} takes single tokens, and {word!r} is {len(ids)} tokens ({ids}); "
            f"{instead} takes several"
        )
    return ids[0]


def check_vocabulary(largest: int, size: int, plugin: gptk.Plugin) -> None:
    """Raises OptionError if the largest of some ids is none of the model's."""
    if largest >= size:
        raise gptk.OptionError(
            f"{plugin.title()}: token {largest} is not in the model's vocabulary of {size}"
        )
