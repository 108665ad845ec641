"""The text and the tokens of a single row, given out while it is decoded."""

from collections import deque
from collections.abc import Sequence

from gptk.decoding.text import TextStream, with_texts
from gptk.hooks.results import Generation, Hypothesis, TopTokens
from gptk.text.tokenizer import Tokenizer

Entry = tuple[int, float, str, TopTokens | None]
"""A token, its log-probability, what it adds to the text, and the likeliest tokens at its step."""


class LiveText:
    """Gives out text, and tokens, once it is certain that they belong to the result.

    Each is given once. A token of the result begins before the end of its text, see
    `make_generation`, and is given once all its text has been.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._text = TextStream(stop)
        self._unstopped = TextStream(()) if stop else None
        """The text without regard to stop strings; None if there are none."""
        self._size = 0
        """Characters of all tokens read, those of a stop string included."""
        self._shown = 0
        """Characters given out."""
        self._read = 0
        """Tokens read."""
        self._open: deque[tuple[Hypothesis, int, str]] = deque()
        """Tokens that are not certain yet: where the text of each begins, and its text."""
        self._certain: list[Entry] = []
        self._given = 0
        """Tokens that are or were in `_certain`."""

    def add(self, row: Hypothesis) -> str:
        """Read the row's new tokens. Returns the text that has become certain."""
        piece = ""
        for link in row.since(self._read):
            if link.reason == "eos":
                continue
            if self._tokenizer is None:
                self._give((link.token, link.logprob, "", link.top))
                continue
            data = self._tokenizer.token_bytes(link.token)
            shown = self._text.push(data)
            text = shown if self._unstopped is None else self._unstopped.push(data)
            self._open.append((link, self._size, text))
            self._size += len(text)
            piece += shown
        self._read = row.length
        self._shown += len(piece)
        while self._open:
            link, start, text = self._open[0]
            if start >= self._shown or start + len(text) > self._shown:
                break
            self._open.popleft()
            top = link.top and with_texts(link.top, self._tokenizer)
            self._give((link.token, link.logprob, text, top))
        return piece

    def finish(self, result: Generation) -> str:
        """Give the rest of the result. Returns the text that was not given yet."""
        rest, self._shown = result.text[self._shown :], len(result.text)
        tops: Sequence[TopTokens | None] = result.top_logprobs or [None] * len(result.tokens)
        entries = zip(result.tokens, result.token_logprobs, result.token_texts, tops, strict=True)
        for entry in list(entries)[self._given :]:
            self._give(entry)
        return rest

    def take(self) -> list[Entry]:
        """The tokens that have become certain since the last call."""
        certain, self._certain = self._certain, []
        return certain

    def _give(self, entry: Entry) -> None:
        self._certain.append(entry)
        self._given += 1
