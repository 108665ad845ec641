"""SentencePiece's tokenizers in a GGUF file, run by the library `tokenizers` as llama.cpp has them.

`llama` is BPE: the text, spaces written as U+2581, is one piece, and of all neighbours that
together are a token those whose token has the highest score are joined first. `tokenizers` has a
list of merges instead: all ways to cut each token in two, the tokens of high score first. Two
tokens with the same score are joined from left to right by llama.cpp, and in the order of the file
here. A character that is no token becomes the tokens of its bytes.

`t5` is Unigram (Kudo 2018): the tokens whose scores, log-probabilities, have the highest sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gptk
from gptk_plugins.tokenizers._library import library

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Types of tokens that are looked for in a text before it is cut (tokenizer.ggml.token_type)."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file by their ids, with scores and types."""

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unknown: int | None

    def found_whole(self, number: int) -> bool:
        """Whether a token is looked for in a text before it is cut."""
        return self.types[number] in (UNKNOWN, CONTROL, USER_DEFINED)


def bpe_by_scores(name: str, vocabulary: Vocabulary, *, prefix: bool) -> gptk.PipelineEncoding:
    """The encoding of a GGUF file of the kind `llama`. prefix: a space is put in front of texts."""
    tokenizers = library(f"{name}: SentencePiece's BPE")
    ids = {token: number for number, token in enumerate(vocabulary.tokens) if token}
    unknown = vocabulary.unknown
    model = tokenizers.models.BPE(
        ids,
        _merges(ids, vocabulary),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    parts = tokenizers.normalizers
    spaces = parts.Replace(" ", SPACE)
    made = tokenizers.Tokenizer(model)
    made.normalizer = parts.Sequence([parts.Prepend(SPACE), spaces]) if prefix else spaces
    return _finished(name, made, vocabulary, prefix=prefix)


def unigram(
    name: str,
    vocabulary: Vocabulary,
    *,
    prefix: bool,
    merge_spaces: bool,
    charsmap: bytes | None,
) -> gptk.PipelineEncoding:
    """The encoding of a GGUF file of the kind `t5`.

    merge_spaces: spaces at both ends are left out, and of others in a row one is kept. charsmap:
    SentencePiece's compiled table of characters to replace.
    """
    tokenizers = library(f"{name}: SentencePiece's Unigram")
    # Only ordinary tokens count for the score of unknown characters, ten below the lowest.
    pairs = [
        (token, 0.0 if vocabulary.found_whole(number) else score)
        for number, (token, score) in enumerate(
            zip(vocabulary.tokens, vocabulary.scores, strict=True)
        )
    ]
    parts, pattern = tokenizers.normalizers, tokenizers.Regex
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pairs, vocabulary.unknown, False))
    steps = [] if charsmap is None else [parts.Precompiled(charsmap)]
    if merge_spaces:
        steps += [parts.Replace(pattern(" +$"), ""), parts.Replace(pattern("^ +"), "")]
        steps += [parts.Replace(pattern(" {2,}"), " ")]
    if prefix or merge_spaces:
        steps.append(parts.Prepend(SPACE))
    made.normalizer = parts.Sequence([*steps, parts.Replace(" ", SPACE)])
    return _finished(name, made, vocabulary, prefix=prefix)


def charsmap_of(values: Sequence[int] | None) -> bytes | None:
    """The bytes of tokenizer.ggml.precompiled_charsmap, whose numbers may have a sign."""
    return bytes(value & 255 for value in values) if values else None


def _merges(ids: Mapping[str, int], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All ways to cut a token in two tokens; the tokens of high score first."""
    parts = {token for token, number in ids.items() if not vocabulary.found_whole(number)}
    by_score = sorted(parts, key=lambda token: (-vocabulary.scores[ids[token]], ids[token]))
    return [
        (token[:end], token[end:])
        for token in by_score
        for end in range(1, len(token))
        if token[:end] in parts and token[end:] in parts
    ]


def _finished(
    name: str, made: "tokenizers.Tokenizer", vocabulary: Vocabulary, *, prefix: bool
) -> gptk.PipelineEncoding:
    """The encoding, with the decoder and the added tokens."""
    tokenizers = library(name)
    decoders = tokenizers.decoders
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    made.add_tokens(
        [
            tokenizers.AddedToken(
                token, normalized=False, special=vocabulary.types[number] != USER_DEFINED
            )
            for number, token in enumerate(vocabulary.tokens)
            if token and vocabulary.found_whole(number)
        ]
    )
    return gptk.PipelineEncoding(Path(name).name, made)
