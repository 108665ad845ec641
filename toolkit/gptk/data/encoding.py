"""Text of any length to token ids, a chunk at a time.

A chunk ends only where the tokenizer splits the text anyway, so the ids are those of the whole
text at once: after a line break or before a space that stands between two characters that are no
spaces, and only if the tokenizer's own split pattern, special tokens and normalization say so of
that very place. Where there is none, the chunk grows.
"""

import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import regex  # type: ignore[import-untyped]  # tiktoken's own dependency

from gptk.text.tokenizer import Tokenizer

CHUNK = 1 << 20
"""Characters in a chunk, roughly."""

_CONTEXT = 64  # characters looked at on both sides of a place to cut
_TRIES = 100  # places of a kind looked at in a chunk, from its end


def encode_documents(
    documents: Iterable[Iterable[str]], tokenizer: Tokenizer, *, chunk: int = CHUNK
) -> Iterator[tuple[bool, np.ndarray]]:
    """The token ids of documents, in order: whether a document begins, and some of its ids.

    A document comes as pieces of text cut anywhere, of which about `chunk` characters for each
    processor are held at a time. Its ids are `tokenizer.encode(text)` of all its pieces joined;
    one without text is left out. Encoding runs in threads: tiktoken works outside the
    interpreter's lock.
    """
    inner = replace(tokenizer, add_bos=False)

    def encode(text: str, first: bool) -> tuple[bool, np.ndarray]:
        ids = (tokenizer if first else inner).encode(text)
        return first, np.array(ids, dtype=np.uint32)

    threads = min(os.cpu_count() or 1, 8)
    cutter = _Cutter(tokenizer)
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[tuple[bool, np.ndarray]]] = deque()
        for document in documents:
            for place, text in enumerate(cutter.chunks(document, chunk)):
                pending.append(pool.submit(encode, text, place == 0))
                if len(pending) > threads:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Cutter:
    """Finds the places where cutting a text does not change its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = list(tokenizer.encoding._special_tokens)
        self._right = max([_CONTEXT, *map(len, self._special)])
        self._normalization = tokenizer.normalization
        try:
            self._pattern = regex.compile(tokenizer.encoding._pat_str)
        except regex.error:  # a dialect that only tiktoken knows: then nothing is cut
            self._pattern = regex.compile(r"[\s\S]+")

    def chunks(self, texts: Iterable[str], size: int) -> Iterator[str]:
        held, searched, wanted = "", 0, size
        for text in texts:
            held += text
            if len(held) < wanted:
                continue
            cut = self._last_cut(held, searched)
            if cut is None:
                searched, wanted = max(len(held) - self._right, 0), 2 * len(held)
            else:
                yield held[:cut]
                held, searched, wanted = held[cut:], 0, size
        if held:
            yield held

    def _last_cut(self, text: str, start: int) -> int | None:
        """The last place after `start` to cut at; line breaks come first if one is not far."""
        far = max(start, len(text) // 2)
        for character, after, least in (("\n", 1, far), (" ", 0, start), ("\n", 1, start)):
            at = len(text) - self._right
            for _ in range(_TRIES):
                at = text.rfind(character, max(least, 1), max(at, 0))
                if at < 0:
                    break
                alone = not (text[at - 1].isspace() or text[at + 1].isspace())
                if alone and self._splits(text, at + after):
                    return at + after
        return None

    def _splits(self, text: str, at: int) -> bool:
        """Whether the tokens of text[:at] and text[at:] are those of the text."""
        for token in self._special:
            if text.find(token, max(at - len(token) + 1, 0), at + len(token) - 1) >= 0:
                return False
        left, right = text[max(at - _CONTEXT, 0) : at], text[at : at + self._right]
        if self._normalization:  # which neither composes nor reorders anything across a space
            left = unicodedata.normalize(self._normalization, left)
            right = unicodedata.normalize(self._normalization, right)
        both = left + right
        # From wherever the pattern begins to match, the cut changes nothing and is not crossed.
        return all(self._end(both, i) == self._end(left, i) for i in range(len(left))) and all(
            self._end(both, len(left) + i) == self._end(right, i) + len(left)
            for i in range(len(right))
        )

    def _end(self, text: str, start: int) -> int:
        """Where the match at `start` ends, or the character that no match begins with."""
        match = self._pattern.match(text, start)
        return start + 1 if match is None else int(match.end())
