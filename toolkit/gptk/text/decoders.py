"""The bytes of single tokens, by the decoder of a `tokenizer.json`.

`tokenizers` decodes a list of tokens to a text, in which bytes that are no UTF-8 are lost. Decoding
strategies need the bytes of each token: for texts that are streamed, stop strings and constraints.
So the steps of a decoder are read here. The bytes of a text are those of its tokens, one after
another, except at its beginning, where many decoders leave out a space:

    bytes of a text = without_beginning(first(t1) + inside(t2) + inside(t3) + …)

A decoder that is of no such form is refused by name: what it does to a token depends on the token
before or after it.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gptk.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder


def _alphabet() -> dict[str, int]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


GPT2_ALPHABET: Mapping[str, int] = _alphabet()
"""GPT-2's alphabet, from characters to bytes: a byte that is a visible character of Latin-1 is that
character, the others are the characters from 256 on, in order."""


class TokenDecoder:
    """From a token's text in the vocabulary to its bytes.

    settings: the decoder of a `tokenizer.json`, or None, which puts a space between tokens. Raises
    TokenizerError for a decoder by which a token alone has no bytes.
    """

    def __init__(self, settings: Mapping[str, Any] | None) -> None:
        self._texts: list[tuple[Decoder, bool]] = []
        """What is done to a token's text; and whether the first token is different."""
        self._bytes: Callable[[str], bytes] = str.encode
        self._beginnings: list[tuple[bytes, int]] = []
        """What is left out at the beginning of a text, and how often at most."""
        self._spaced = settings is None
        steps = [] if settings is None else _flat(settings)
        whole = False
        for number, step in enumerate(steps):
            match step:
                case {"type": "Fuse"}:
                    whole = True
                case {"type": "ByteLevel"} if not whole and self._bytes is str.encode:
                    self._bytes, whole = _bytes_by_gpt2, True
                case {"type": "ByteFallback"} if not whole and self._bytes is str.encode:
                    self._bytes = _bytes_by_name
                    if steps[number + 1 :] and steps[number + 1].get("type") != "Fuse":
                        raise _refusal(step, f" before {_kind(steps[number + 1])}")
                case {"type": "Strip", "stop": 0, "content": str(text), "start": int(most)} if (
                    whole
                ):
                    self._beginnings.append((text.encode(), most))
                case {"type": "Strip", "stop": 0} | {"type": "Replace"} if not whole:
                    self._texts.append((_library_decoder(step), False))
                case {"type": "Metaspace" | "WordPiece"} if not whole:
                    self._texts.append((_library_decoder(step), True))
                case _:
                    raise _refusal(step, " of a whole text" if whole else "")

    def inside(self, token: str) -> bytes:
        """The bytes of a token that is not the first of a text."""
        for decoder, by_place in self._texts:
            token = decoder.decode(["", token]) if by_place else decoder.decode([token])
        return b" " * self._spaced + self._bytes(token)

    def first(self, token: str) -> bytes:
        """The bytes of the first token, before `without_beginning`."""
        for decoder, _ in self._texts:
            token = decoder.decode([token])
        return self._bytes(token)

    def without_beginning(self, text: bytes) -> bytes:
        """The bytes of a text, without what the decoder leaves out at its beginning."""
        for left_out, most in self._beginnings:
            for _ in range(most):
                if not text.startswith(left_out):
                    break
                text = text[len(left_out) :]
        return text


def _flat(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of a decoder, those within a Sequence too."""
    if settings.get("type") != "Sequence":
        return [settings]
    return [step for inner in settings["decoders"] for step in _flat(inner)]


def _kind(step: Mapping[str, Any]) -> str:
    return str(step.get("type"))[:60]


def _refusal(step: Mapping[str, Any], where: str) -> TokenizerError:
    return TokenizerError(
        f"the decoder {_kind(step)}{where} is not supported: what it does to a token depends on "
        "the tokens around it"
    )


def _library_decoder(step: Mapping[str, Any]) -> "Decoder":
    """A decoder of `tokenizers` with these settings."""
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    whole = {"version": "1.0", "added_tokens": [], "model": model, "decoder": step}
    decoder: Decoder = Tokenizer.from_str(json.dumps(whole)).decoder
    return decoder


_NAMED_BYTE = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


def _bytes_by_gpt2(token: str) -> bytes:
    """The bytes that a token spells in GPT-2's alphabet; those of its text if it does not."""
    try:
        return bytes([GPT2_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _bytes_by_name(token: str) -> bytes:
    """The byte that a token such as <0x0A> names, or those of its text."""
    named = _NAMED_BYTE.fullmatch(token)
    return bytes([int(named[1], 16)]) if named else token.encode()
