"""Byte-level byte-pair encoding that takes any text: a `tiktoken.Encoding` without its limits.

tiktoken's engine for split patterns gives up on a run of a million spaces, and then panics: an
error that is no Exception. It can be trusted with the patterns in SPLIT_PATTERNS, as long as no run
is near that length; there it is fast, and other threads run beside it. All other texts and patterns
are split by `regex`, in a time that grows with the text's length, and tiktoken merges the pieces.
"""

import contextlib
import functools
import itertools
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import regex  # type: ignore[import-untyped]  # tiktoken's own dependency
import tiktoken

from gptk.errors import TokenizerError
from gptk.text.ids import check_ids
from gptk.text.patterns import SPLIT_PATTERNS, SplitPattern


class ByteLevelBPE(tiktoken.Encoding):
    """A `tiktoken.Encoding` for any text, and for vocabularies that lack bytes.

    A byte that the vocabulary lacks is dropped from its piece before the merges, as `tokenizers`
    does (tiktoken itself panics). Tokens in `decode_only` are decoded, but never encoded.

    Raises TokenizerError for a split pattern that is not known to mean the same in all engines,
    for two tokens with one id, and for ids far beyond the number of tokens.
    """

    def __init__(
        self,
        name: str,
        *,
        pat_str: str,
        mergeable_ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        decode_only: Mapping[int, bytes] | None = None,
    ) -> None:
        decode_only = {} if decode_only is None else decode_only
        highest = check_ids(mergeable_ranks.values(), [*special_tokens.values(), *decode_only])
        if b"" in mergeable_ranks:
            raise TokenizerError("a token of the vocabulary is empty")
        absent = [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]
        # Absent bytes get ids beyond the vocabulary, by which `encode_ordinary` notices them.
        stand_ins = {bytes([byte]): highest + 1 + i for i, byte in enumerate(absent)}
        try:
            super().__init__(
                name,
                pat_str=pat_str,
                mergeable_ranks={**mergeable_ranks, **stand_ins},
                special_tokens=special_tokens,
            )
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise TokenizerError(f"its split pattern cannot be used: {reason}") from None
        self._mergeable_ranks = mergeable_ranks
        self.max_token_value = highest
        self._prepare(decode_only, bytes(absent))

    @classmethod
    def of(cls, encoding: tiktoken.Encoding) -> "ByteLevelBPE":
        """The same encoding as one that takes any text; its tables are shared, not copied."""
        if isinstance(encoding, cls):
            return encoding
        ranks = encoding._mergeable_ranks
        absent = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        if absent:
            return cls(
                encoding.name,
                pat_str=encoding._pat_str,
                mergeable_ranks=ranks,
                special_tokens=encoding._special_tokens,
            )
        new = cls.__new__(cls)
        new.__dict__.update(encoding.__dict__)
        new._prepare({}, absent)
        return new

    def _prepare(self, decode_only: Mapping[int, bytes], absent: bytes) -> None:
        self.decode_only = decode_only
        self._absent = absent
        parsed = SplitPattern.parse(self._pat_str, "tiktoken").written("regex")
        self._regex = regex.compile(parsed)
        self._trusted = parsed in _trusted_patterns()
        self._pieces: dict[str, list[int]] = {}

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of a text, with special tokens encoded as ordinary text.

        Lone surrogates become U+FFFD. Raises TokenizerError if a split pattern that is not in
        SPLIT_PATTERNS takes too long.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self._trusted and not _has_long_run(text):
            ids = super().encode_ordinary(text)
            if not self._absent or max(ids, default=0) <= self.max_token_value:
                return ids
        pieces = self.split(text)
        return list(itertools.chain.from_iterable(map(self._encode_piece, pieces)))

    def split(self, text: str) -> list[str]:
        """The pieces of a text that are merged each for itself."""
        visible = _as_tiktoken_sees(text)
        with self._time_for(text) as seconds:
            if visible is text:
                pieces: list[str] = self._regex.findall(text, timeout=seconds)
                return pieces
            found = self._regex.finditer(visible, timeout=seconds)
            return [text[match.start() : match.end()] for match in found]

    def piece_ends(self, text: str) -> list[int]:
        """For each character, where a piece that begins with it ends; the next character if none
        can begin there. Raises TokenizerError if the split pattern takes too long."""
        visible = _as_tiktoken_sees(text)
        with self._time_for(text) as seconds:
            deadline = time.monotonic() + seconds
            matches = (
                self._regex.match(visible, i, timeout=max(deadline - time.monotonic(), 1e-3))
                for i in range(len(text))
            )
            return [match.end() if match else i + 1 for i, match in enumerate(matches)]

    @contextlib.contextmanager
    def _time_for(self, text: str) -> Iterator[float]:
        """Gives the seconds that splitting a text may take, and explains if it takes more."""
        try:
            yield _SECONDS + len(text) / _CHARACTERS_A_SECOND
        except (TimeoutError, MemoryError):
            raise TokenizerError(
                f"the split pattern of the tokenizer {self.name} takes too long on a text of "
                f"{len(text):,} characters: {self._pat_str[:60]!r}"
            ) from None

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._pieces.get(piece)
        if ids is None:
            ids = self._encode_single_piece(piece.encode())
            if len(piece) <= _CACHED_LENGTH:
                if len(self._pieces) >= _CACHED_PIECES:
                    self._pieces.clear()
                self._pieces[piece] = ids
        return ids

    def _encode_single_piece(self, text_or_bytes: str | bytes) -> list[int]:
        piece = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
        if self._absent:
            piece = piece.translate(None, delete=self._absent)
        return super()._encode_single_piece(piece) if piece else []

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of a token. Raises KeyError for an id that the vocabulary lacks."""
        if token in self.decode_only:
            return self.decode_only[token]
        if not 0 <= token <= self.max_token_value:
            raise KeyError(token)
        return super().decode_single_token_bytes(token)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens. Raises KeyError for an id that the vocabulary lacks."""
        return b"".join(map(self.decode_single_token_bytes, tokens))

    def decode(self, tokens: Iterable[int], errors: str = "replace") -> str:
        """The text of tokens."""
        return self.decode_bytes(tokens).decode("utf-8", errors)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pat_str": self._pat_str,
            "mergeable_ranks": self._mergeable_ranks,
            "special_tokens": self._special_tokens,
            "decode_only": self.decode_only,
        }


def _has_long_run(text: str) -> bool:
    """Whether a text has 200,000 spaces or digits in a row, or nearly as many.

    tiktoken's engine takes a million; the trusted patterns put only such runs on its stack.
    """
    # A run of 200,000 has in it all that is between two of these places.
    places = range(0, len(text) - _PART, _PART)
    return any(_ONLY_RUN.fullmatch(text, place, place + _PART) for place in places)


_PART = 100_000
_ONLY_RUN = regex.compile(r"[\s\p{N}]+")
_SECONDS, _CHARACTERS_A_SECOND = 2, 100_000  # a hundred times what the trusted patterns take
_CACHED_PIECES, _CACHED_LENGTH = 50_000, 32


@functools.cache
def _trusted_patterns() -> frozenset[str]:
    known = [SplitPattern.parse(pattern, "tiktoken") for pattern in SPLIT_PATTERNS.values()]
    return frozenset(p.written("regex") for k in known for p in (k, k.with_gaps()))


def _as_tiktoken_sees(text: str) -> str:
    """The text, with U+0378 for each character that is assigned only in a Unicode version newer
    than that of tiktoken's engine, and which `regex` may know already."""
    unknown = "".join({c for c in set(text) if c > "\u02ff" and unicodedata.category(c) == "Cn"})
    if not unknown:
        return text
    unassigned = bytes(_unassigned().encode_ordinary(unknown)).decode()
    return text.translate(dict.fromkeys(map(ord, unassigned), "\u0378"))


@functools.cache
def _unassigned() -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        "unassigned", pat_str=r"\p{Cn}", mergeable_ranks=ranks, special_tokens={}
    )
