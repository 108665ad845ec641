"""Text of any length to token ids, a chunk at a time.

A chunk ends only where the tokenizer itself splits the text, so the ids are those of the whole
text. Candidates are positions after a line break, or before a space, with a character that is no
space on either side; the tokenizer's split pattern, special tokens and normalization then decide
about each. A chunk without such a position grows.

Of a tokenizer that `tokenizers` runs, the pieces are not known. There, a cut is where no token of
the vocabulary could lie across it, and the text near it has the same tokens with and without the
cut. Such a tokenizer may begin a text in its own way, with a space for example; so a chunk is
encoded with some of the text before it, whose tokens are then left out.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np

from gptk.text.encoding import ByteLevelBPE
from gptk.text.normalization import normalize
from gptk.text.pipeline import PipelineEncoding
from gptk.text.tokenizer import Tokenizer

CHUNK = 1 << 20
"""Characters in a chunk, roughly."""

_CONTEXT = 64  # characters examined on both sides of a cut
_TRIES = 100  # candidates of a kind examined in a chunk, from its end


def encode_documents(
    documents: Iterable[Iterable[str]], tokenizer: Tokenizer, *, chunk: int = CHUNK
) -> Iterator[tuple[bool, np.ndarray]]:
    """The token ids of documents, chunk by chunk: whether the chunk begins a document, and its ids.

    A document is an iterable of pieces of text, cut anywhere; about `chunk` characters for each
    processor are in memory at a time. A document's ids are those of `tokenizer.encode` of its
    pieces joined, without an EOS; documents without text are left out. Encoding runs in threads:
    tiktoken releases the interpreter's lock. Raises TokenizerError if an unusual split pattern
    takes too long.
    """
    first_chunk = replace(tokenizer, add_eos=False)

    def encode(before: str, text: str, first: bool) -> tuple[bool, np.ndarray]:
        if first:
            ids = first_chunk.encode(text)
        else:
            left_out = len(tokenizer.encode_without_bos(before)) if before else 0
            ids = tokenizer.encode_without_bos(before + text)[left_out:]
        return first, np.array(ids, dtype=np.uint32)

    threads = min(os.cpu_count() or 1, 8)
    by_pipeline = isinstance(tokenizer.encoding, PipelineEncoding)
    cutter = _PipelineCutter(tokenizer) if by_pipeline else _Cutter(tokenizer)
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[tuple[bool, np.ndarray]]] = deque()
        for document in documents:
            for number, (before, text) in enumerate(cutter.chunks(document, chunk)):
                pending.append(pool.submit(encode, before, text, number == 0))
                if len(pending) > threads:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Chunks:
    """Cuts texts where this does not change their tokens."""

    _right_context = _CONTEXT
    """Characters that are read behind a cut."""

    def chunks(self, texts: Iterable[str], size: int) -> Iterator[tuple[str, str]]:
        """The texts joined, in chunks of `size` characters or more, each with the text before it
        that it needs."""
        held, before, searched, wanted = "", "", 0, size
        for text in texts:
            held += text
            if len(held) < wanted:
                continue
            cut = self._last_cut(held, searched)
            if cut is None:
                searched, wanted = max(len(held) - self._right_context, 0), 2 * len(held)
            else:
                yield before, held[:cut]
                before = self._needed(held[:cut])
                held, searched, wanted = held[cut:], 0, size
        if held:
            yield before, held

    def _needed(self, text: str) -> str:
        """What of a text is needed to encode what follows."""
        return ""

    def _last_cut(self, text: str, start: int) -> int | None:
        """The last position after `start` to cut at; line breaks in the second half come first."""
        half = max(start, len(text) // 2)
        for character, offset, lowest in (("\n", 1, half), (" ", 0, start), ("\n", 1, start)):
            found = len(text) - self._right_context
            for _ in range(_TRIES):
                found = text.rfind(character, max(lowest, 1), max(found, 0))
                if found < 0:
                    break
                single = not (text[found - 1].isspace() or text[found + 1].isspace())
                if single and self._splits(text, found + offset):
                    return found + offset
        return None

    def _splits(self, text: str, cut: int) -> bool:
        """Whether the tokens of text[:cut] and text[cut:] together are those of the text."""
        raise NotImplementedError


class _Cutter(_Chunks):
    """By the split pattern of byte-level BPE."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert not isinstance(tokenizer.encoding, PipelineEncoding)
        self._form = tokenizer.normalization
        special = [self._normalized(text) for text in tokenizer.encoding._special_tokens]
        # Some take the character before or after them along.
        self._special = [*tokenizer.encoding._special_tokens, *special]
        self._right_context = max([_CONTEXT, *(len(text) + 1 for text in self._special)])
        self._ends = ByteLevelBPE.of(tokenizer.encoding).piece_ends

    def _splits(self, text: str, cut: int) -> bool:
        """Whether the tokens of text[:cut] and text[cut:] together are those of the text."""
        left = text[max(cut - self._right_context, 0) : cut]
        right = text[cut : cut + self._right_context]
        # A normal form neither composes nor reorders characters across a space.
        for before, after in ((left, right), (self._normalized(left), self._normalized(right))):
            near = before + after
            for token in self._special:
                first, last = len(before) - len(token) - 1, len(before) + len(token) + 1
                if near.find(token, max(first, 0), last) >= 0:
                    return False
        left, right = self._normalized(left[-_CONTEXT:]), self._normalized(right)
        # Wherever a piece begins, it ends at the same character with and without the cut.
        apart = [*self._ends(left), *(end + len(left) for end in self._ends(right))]
        return self._ends(left + right) == apart

    def _normalized(self, text: str) -> str:
        return text if self._form is None else normalize(self._form, text)


class _PipelineCutter(_Chunks):
    """By the vocabulary of a tokenizer that `tokenizers` runs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        encoding = tokenizer.encoding
        assert isinstance(encoding, PipelineEncoding)
        self._encode = encoding.encode
        texts = (
            tokenizer.token_bytes(token).decode("utf-8", "ignore")
            for token in range(encoding.n_vocab)
        )
        self._pairs = {pair for text in texts for pair in pairwise(text)}
        """Neighbours that some token has."""
        self._right_context = 2 * _CONTEXT

    def _needed(self, text: str) -> str:
        return text[-2 * _CONTEXT :]

    def _splits(self, text: str, cut: int) -> bool:
        if (text[cut - 1], text[cut]) in self._pairs:
            return False
        left, right = self._needed(text[:cut]), text[cut : cut + self._right_context]
        ids, apart = self._encode(left + right), self._encode(left)
        # What `right` adds must not depend on where the text before it begins.
        near = left[len(left) // 2 :]
        added = self._encode(near + right)[len(self._encode(near)) :]
        return ids[: len(apart)] == apart and ids[len(apart) :] == added
