"""Byte-level byte-pair encoding: a `gptk.ByteLevelBPE` from a vocabulary, merges and a pattern.

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

import gptk
from gptk.plugins import shown


class NotByTiktokenError(gptk.TokenizerError):
    """tiktoken would give other tokens than the file says."""


def byte_level_bpe(
    source: str,
    *,
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    special: Mapping[str, int],
    pattern: str,
    whole_words: bool = False,
) -> gptk.ByteLevelBPE:
    """An encoding from a vocabulary whose tokens are written in GPT-2's alphabet for bytes.

    `special` are the special tokens, matched verbatim in a text, with their ids; they may also be
    in the vocabulary. `whole_words` (`ignore_merges` in a tokenizer.json): a piece that is in the
    vocabulary is that token, without merging; this is for vocabularies converted from tiktoken,
    whose merges are all the ways to split each token in two.

    Raises TokenizerError, naming `source`; NotByTiktokenError if tiktoken would give other tokens
    than the merges.
    """
    if len(set(vocabulary.values())) < len(vocabulary):
        raise gptk.TokenizerError(f"{source}: two tokens of the vocabulary have the same id")
    taken = {number: token for token, number in vocabulary.items()}
    for token, number in special.items():
        if taken.get(number, token) != token:
            raise gptk.TokenizerError(
                f"{source}: the special token {shown(token)} has the id {number}, which is "
                f"that of {shown(taken[number])}"
            )
    merged = _formed_by_merges(source, vocabulary, merges, keep_all=whole_words)
    special_ids = set(special.values())
    ranks, decode_only = {}, {}
    for token, number in vocabulary.items():
        piece = _token_bytes(token)
        kept_whole = whole_words and number not in special_ids
        if piece and (len(piece) == 1 or number in merged or kept_whole):
            ranks[piece] = number
        elif number not in special_ids:
            # GGUF files can have tokens that are not valid UTF-8.
            text = token.encode("utf-8", "surrogateescape")
            decode_only[number] = text if piece is None else piece
    try:
        return gptk.ByteLevelBPE(
            Path(source).name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens=dict(special),
            decode_only=decode_only,
        )
    except gptk.TokenizerError as error:
        raise gptk.TokenizerError(f"{source}: {error}") from None


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
                f"{source}: merge {index} ({left:.60} {right:.60}) needs the token {error!s:.60}, "
                "which is not in the vocabulary"
            ) from None
        if product < last:
            raise NotByTiktokenError(
                f"{source}: merge {index} ({left:.60} {right:.60}) makes token {product} after "
                f"token {last}"
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
            raise NotByTiktokenError(
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


def _token_bytes(token: str) -> bytes | None:
    try:
        return bytes([gptk.GPT2_ALPHABET[character] for character in token])
    except KeyError:
        return None
