"""Tokenizers: a `tiktoken.Encoding` with the special tokens and chat template of a model."""

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back."""

    encoding: "tiktoken.Encoding"
    bos: int | None = None
    """The token that begins a text, if the model has one."""
    eos: tuple[int, ...] = ()
    """The tokens that end a text."""
    add_bos: bool = False
    """Put `bos` in front of every text."""
    normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    """The Unicode normal form that is applied to texts first."""
    chat_template: str | None = None
    """The model's jinja2 template for conversations."""
    template_tokens: Mapping[str, str] | None = None
    """The template's bos_token and eos_token; by default the texts of `bos` and the first `eos`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which special tokens are recognized.

        Where two special tokens begin at the same character, the longer one is taken. They are
        found before the text is normalized.
        """
        ids: list[int] = []
        pattern, special = self._special
        for index, part in enumerate(pattern.split(text)):
            if index % 2:  # the pattern is one group, so its matches are every second part
                ids.append(special[part])
            elif part:
                if self.normalization:
                    part = unicodedata.normalize(self.normalization, part)
                ids += self.encoding.encode_ordinary(part)
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of tokens. An id that the vocabulary lacks becomes U+FFFD; models whose
        vocabulary is padded have such ids."""
        return b"".join(map(self.token_bytes, tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token."""
        return self._token_bytes(token)

    @functools.cached_property
    def start(self) -> int | None:
        """The token to start from without a prompt: BOS, else the first of `eos`, else None."""
        return self.bos if self.bos is not None else (self.eos[0] if self.eos else None)

    @functools.cached_property
    def _special(self) -> tuple[re.Pattern[str], dict[str, int]]:
        # tiktoken's own search does not prefer the longest special token.
        special = self.encoding._special_tokens
        longest_first = sorted(special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})"), special

    @functools.cached_property
    def _token_bytes(self) -> "functools._lru_cache_wrapper[bytes]":
        @functools.cache
        def token_bytes(token: int) -> bytes:
            try:
                return self.encoding.decode_single_token_bytes(token)
            except KeyError:
                return "\N{REPLACEMENT CHARACTER}".encode()

        return token_bytes
