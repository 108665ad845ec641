"""Byte-level byte-pair encoding: a `tiktoken.Encoding` from a vocabulary, merges and a pattern.

A text is split by a pattern, each piece becomes bytes, and the pair of neighbours that comes
first in the list of merges is joined until no pair is left (Sennrich et al. 2016; on bytes,
Radford et al. 2019).

tiktoken keeps no list of merges: it joins any two neighbours whose bytes together are a token,
the token with the lowest id first. Both give the same tokens if ids ascend in the order of the
merges and every token that can be joined results from merging its own bytes. The first is checked
here; a token that fails the second cannot come from any text, and is kept for decoding only.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import regex  # type: ignore[import-untyped]  # tiktoken's own dependency
import tiktoken

import gptk

# How the text between special tokens is split, by the model that used it first. `++` (possessive)
# changes the time only: what follows such a run cannot begin within it.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _CL100K.replace("DIGITS", r"\p{N}{1,3}")
QWEN2 = _CL100K.replace("DIGITS", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def digits_then_gpt2(*, individual: bool) -> str:
    """Digits are split off first, then GPT-2's pattern splits the text between them.

    For GPT-2's pattern a digit is then the end of the text: whitespace before it stays whole.
    individual: each digit is a piece, rather than each run of digits.
    """
    digits = r"\p{N}" if individual else r"\p{N}++"
    return (
        rf"{digits}|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++| ?[^\s\p{{L}}\p{{N}}]++|\s+(?![^\s\p{{N}}])|\s"
    )


SMOLLM = digits_then_gpt2(individual=True)


def byte_level_bpe(
    source: str,
    *,
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    special: Mapping[str, int],
    pattern: str,
    whole_words: bool = False,
) -> "ByteLevelBPE":
    """An encoding from a vocabulary whose tokens are written in GPT-2's alphabet for bytes.

    `special` are the special tokens, matched verbatim in a text, with their ids; they may also be
    in the vocabulary. `whole_words` (`ignore_merges` in a tokenizer.json): a piece that is in the
    vocabulary is that token, without merging; this is for vocabularies converted from tiktoken,
    whose merges are all the ways to split each token in two.

    Raises TokenizerError, naming `source`, if tiktoken would give other tokens than the merges.
    """
    if len(set(vocabulary.values())) < len(vocabulary):
        raise gptk.TokenizerError(f"{source}: two tokens of the vocabulary have the same id")
    merged = _formed_by_merges(source, vocabulary, merges, keep_all=whole_words)
    special_ids = set(special.values())
    ranks, decode_only = {}, {}
    for token, number in vocabulary.items():
        piece = _token_bytes(token)
        kept_whole = whole_words and number not in special_ids
        if piece and (len(piece) == 1 or number in merged or kept_whole):
            ranks[piece] = number
        elif number not in special_ids:
            decode_only[number] = token.encode() if piece is None else piece
    try:
        # An empty piece makes tiktoken panic.
        if any(not match[0] for match in regex.finditer(pattern, "An 'empty' match, 1000\n\n")):
            raise ValueError(f"{pattern} matches between characters")
        return ByteLevelBPE(
            Path(source).name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens=dict(special),
            decode_only=decode_only,
        )
    except (ValueError, regex.error) as error:
        reason = str(error).partition("\n")[0]
        raise gptk.TokenizerError(f"{source}: cannot use its split pattern: {reason}") from None


class ByteLevelBPE(tiktoken.Encoding):
    """A `tiktoken.Encoding` for vocabularies that lack bytes or have tokens that only decode.

    A byte that the vocabulary lacks is dropped from its piece before the merges, as `tokenizers`
    does (tiktoken itself panics). Tokens in `decode_only` are decoded, but never encoded.
    """

    def __init__(
        self,
        name: str,
        *,
        pat_str: str,
        mergeable_ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        decode_only: Mapping[int, bytes],
    ) -> None:
        highest = max(
            [*mergeable_ranks.values(), *special_tokens.values(), *decode_only], default=-1
        )
        absent = [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]
        # Absent bytes get ids beyond the vocabulary, by which `encode_ordinary` notices them.
        stand_ins = {bytes([byte]): highest + 1 + i for i, byte in enumerate(absent)}
        super().__init__(
            name,
            pat_str=pat_str,
            mergeable_ranks={**mergeable_ranks, **stand_ins},
            special_tokens=special_tokens,
        )
        self._mergeable_ranks = mergeable_ranks
        self.max_token_value = highest
        self.decode_only = decode_only
        self._absent = bytes(absent)

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of a text, with special tokens encoded as ordinary text."""
        ids = super().encode_ordinary(text)
        if not self._absent or max(ids, default=0) <= self.max_token_value:
            return ids
        ids = []
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for match in regex.finditer(self._pat_str, text):
            if piece := match[0].encode().translate(None, delete=self._absent):
                ids += self._encode_single_piece(piece)
        return ids

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of a token. Raises KeyError for an id that the vocabulary lacks."""
        if token in self.decode_only:
            return self.decode_only[token]
        if token > self.max_token_value:
            raise KeyError(token)
        return super().decode_single_token_bytes(token)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens. Raises KeyError for an id that the vocabulary lacks."""
        return b"".join(map(self.decode_single_token_bytes, tokens))

    def decode(self, tokens: Iterable[int], errors: str = "replace") -> str:
        """The text of tokens."""
        return self.decode_bytes(tokens).decode("utf-8", errors)

    def __getstate__(self) -> object:
        return {
            "name": self.name,
            "pat_str": self._pat_str,
            "mergeable_ranks": self._mergeable_ranks,
            "special_tokens": self._special_tokens,
            "decode_only": self.decode_only,
        }


def _formed_by_merges(
    source: str,
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    keep_all: bool,
) -> Mapping[int, tuple[int, int]]:
    """The tokens that result from merging their own bytes, each with its two halves.

    keep_all: include tokens whose merge never applies to their own bytes, see `whole_words`.
    """
    pairs: dict[tuple[int, int], int] = {}
    merged: dict[int, tuple[int, int]] = {}
    formed = {number for token, number in vocabulary.items() if len(token) == 1}
    early: list[tuple[int, int, int]] = []
    last = -1
    for index, (left, right) in enumerate(merges, 1):
        try:
            halves = vocabulary[left], vocabulary[right]
            product = vocabulary[left + right]
        except KeyError as error:
            raise gptk.TokenizerError(
                f"{source}: merge {index} ({left} {right}) needs the token {error}, "
                "which is not in the vocabulary"
            ) from None
        if product < last:
            raise gptk.TokenizerError(
                f"{source}: merge {index} ({left} {right}) makes token {product} after token "
                f"{last}; only vocabularies in the order of their merges are supported"
            )
        last = product
        pairs[halves] = product
        if product in merged:
            continue
        if not formed.issuperset(halves):
            early.append((index, *halves))
        elif keep_all or _reach_merge(*halves, product, pairs, merged):
            merged[product] = halves
            formed.add(product)
    for index, left_id, right_id in early:
        if not keep_all and {left_id, right_id} <= formed:
            raise gptk.TokenizerError(
                f"{source}: merge {index} joins a token that only a later merge makes"
            )
    return merged


def _reach_merge(
    left: int,
    right: int,
    limit: int,
    pairs: Mapping[tuple[int, int], int],
    merged: Mapping[int, tuple[int, int]],
) -> bool:
    """Whether two neighbours still exist when the merge that makes token `limit` is applied.

    They do not if an earlier merge joins tokens across the border between them. So this undoes
    merges backwards, always that of the half made later, and checks for each pair of tokens at the
    border whether an earlier merge joins it.
    """
    while pairs.get((left, right), limit) >= limit:
        if left in merged and (right not in merged or left > right):
            limit, left = left, merged[left][1]
        elif right in merged:
            # Of two equal merges the left one is applied first: the one across the border.
            limit, right = right + 1, merged[right][0]
        else:
            return True
    return False


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet, from characters to bytes: a byte that is a visible character of Latin-1 is
    that character, the others are the characters from 256 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


ALPHABET = _alphabet()


def _token_bytes(token: str) -> bytes | None:
    try:
        return bytes([ALPHABET[character] for character in token])
    except KeyError:
        return None
