"""Text of any length to token ids, a chunk at a time.

A chunk ends only where the tokenizer itself splits the text, so the ids are those of the whole
text. Candidates are positions after a line break, or before a space, with a character that is no
space on either side; the tokenizer's split pattern, special tokens and normalization then decide
about each. A chunk without such a position grows.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from gptk.text.encoding import ByteLevelBPE
from gptk.text.normalization import normalize
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
    pieces joined; documents without text are left out. Encoding runs in threads: tiktoken releases
    the interpreter's lock. Raises TokenizerError if an unusual split pattern takes too long.
    """
    without_bos = replace(tokenizer, add_bos=False)

    def encode(text: str, first: bool) -> tuple[bool, np.ndarray]:
        ids = (tokenizer if first else without_bos).encode(text)
        return first, np.array(ids, dtype=np.uint32)

    threads = min(os.cpu_count() or 1, 8)
    cutter = _Cutter(tokenizer)
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[tuple[bool, np.ndarray]]] = deque()
        for document in documents:
            for number, text in enumerate(cutter.chunks(document, chunk)):
                pending.append(pool.submit(encode, text, number == 0))
                if len(pending) > threads:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Cutter:
    """Finds positions where cutting a text does not change its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._form = tokenizer.normalization
        special = [self._normalized(text) for text in tokenizer.encoding._special_tokens]
        # Some take the character before or after them along.
        self._special = [*tokenizer.encoding._special_tokens, *special]
        self._right_context = max([_CONTEXT, *(len(text) + 1 for text in self._special)])
        self._ends = ByteLevelBPE.of(tokenizer.encoding).piece_ends

    def chunks(self, texts: Iterable[str], size: int) -> Iterator[str]:
        """The texts joined, in chunks of `size` characters or more."""
        held, searched, wanted = "", 0, size
        for text in texts:
            held += text
            if len(held) < wanted:
                continue
            cut = self._last_cut(held, searched)
            if cut is None:
                searched, wanted = max(len(held) - self._right_context, 0), 2 * len(held)
            else:
                yield held[:cut]
                held, searched, wanted = held[cut:], 0, size
        if held:
            yield held

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
