"""Tokenizers: an encoding with the special tokens and chat template of a model."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptk.errors import TokenizerError
from gptk.text.normalization import NormalForm, normalize
from gptk.text.pipeline import PipelineEncoding
from gptk.text.special_tokens import SpecialOption, SpecialTokens

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back, by a `gptk.PipelineEncoding` or a `gptk.ByteLevelBPE`, which any
    other `tiktoken.Encoding` becomes.

    Raises TokenizerError if the encoding's split pattern may mean different things, or if settings
    are given that a PipelineEncoding has itself.
    """

    encoding: "tiktoken.Encoding | PipelineEncoding"
    bos: int | None = None
    """The token that begins a text, if the model has one."""
    eos: tuple[int, ...] = ()
    """The tokens that end a text."""
    add_bos: bool = False
    """Put `bos` in front of every text."""
    add_eos: bool = False
    """Put the first of `eos` behind every text, as models for embeddings and T5 have it."""
    normalization: NormalForm | None = None
    """The Unicode normal form that is applied to texts first."""
    chat_template: str | None = None
    """The model's jinja2 template for conversations."""
    template_tokens: Mapping[str, str] | None = None
    """What the template knows as bos_token, eos_token, pad_token and so on; by default the texts of
    `bos` and the first `eos`."""
    special_options: Mapping[str, Sequence[SpecialOption]] | None = None
    """How special tokens are found that are not simply taken wherever their text stands: by text,
    some of "normalized", "lstrip", "rstrip", "single_word", "as_text"; see
    gptk.text.special_tokens."""

    def __post_init__(self) -> None:
        if isinstance(self.encoding, PipelineEncoding):
            if self.normalization or self.special_options:
                raise TokenizerError(
                    "a PipelineEncoding normalizes texts and finds special tokens itself: leave "
                    "out normalization and special_options"
                )
            return
        from gptk.text.encoding import ByteLevelBPE  # tiktoken is not needed before

        object.__setattr__(self, "encoding", ByteLevelBPE.of(self.encoding))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which special tokens are recognized.

        Where two special tokens begin at the same character, the longer one is taken. Unless
        `special_options` says otherwise they are found before the text is normalized. Raises
        TokenizerError if an unusual split pattern takes too long.
        """
        ids = self.encode_without_bos(text)
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        if self.add_eos and self.eos:
            ids.append(self.eos[0])
        return ids

    def encode_without_bos(self, text: str) -> list[int]:
        """Token ids of a text to which neither BOS nor EOS is added."""
        if isinstance(self.encoding, PipelineEncoding):
            return self.encoding.encode(text)
        ids: list[int] = []
        for part, token in self._parts(text):
            if token is None:
                ids += self.encoding.encode_ordinary(part)
            else:
                ids.append(token)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens that are a whole text; bytes that are not UTF-8 become U+FFFD.

        What is appended to a text has the tokens' bytes: `decode(a + b)` is `decode(a)` and the
        `token_bytes` of b, if `decode(a)` is not empty.
        """
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of tokens that are a whole text. An id that the vocabulary lacks becomes
        U+FFFD; models whose vocabulary is padded have such ids."""
        if isinstance(self.encoding, PipelineEncoding):
            return self.encoding.decode_bytes(tokens)
        return b"".join(map(self.token_bytes, tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token within a text, as if other tokens came before it. Some tokenizers,
        SentencePiece's for one, leave out a space at the beginning of a text: see `decode`."""
        return self._token_bytes(token)

    @functools.cached_property
    def start(self) -> int | None:
        """The token to start from without a prompt: BOS, else the first of `eos`, else None."""
        return self.bos if self.bos is not None else (self.eos[0] if self.eos else None)

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The text, normalized, in parts: ordinary text with None, or "" with a special token."""
        verbatim, normalized = self._special
        for part, token in verbatim.parts(text):
            if token is not None:
                yield part, token
            else:
                yield from normalized.parts(self._normalize(part))

    def _normalize(self, text: str) -> str:
        return normalize(self.normalization, text) if self.normalization else text

    def encode_within(self, text: str) -> list[int]:
        """Token ids of a text that continues another one: neither BOS nor EOS is added, nor a space
        that the tokenizer puts in front of a text."""
        if isinstance(self.encoding, PipelineEncoding):
            return self.encoding.encode_within(text)
        return self.encode_without_bos(text)

    @functools.cached_property
    def _special(self) -> tuple[SpecialTokens, SpecialTokens]:
        """The special tokens found in the text as it is, and those found in the normalized text."""
        ids, options = self.encoding._special_tokens, self.special_options or {}
        verbatim = SpecialTokens(ids, options, normalized=False, normalize=self._normalize)
        return verbatim, SpecialTokens(ids, options, normalized=True, normalize=self._normalize)

    @functools.cached_property
    def _token_bytes(self) -> "functools._lru_cache_wrapper[bytes]":
        # As in `tokenizers`, a token that is found in normalized text stands for normalized text.
        normalized = {
            token: self._normalize(text).encode()
            for text, token in self.encoding._special_tokens.items()
            if "normalized" in (self.special_options or {}).get(text, ())
        }

        @functools.cache
        def token_bytes(token: int) -> bytes:
            if token in normalized:
                return normalized[token]
            try:
                return self.encoding.decode_single_token_bytes(token)
            except (KeyError, OverflowError):
                return "\N{REPLACEMENT CHARACTER}".encode()

        return token_bytes
