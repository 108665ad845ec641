"""Text from tokens as they come, and the result of a finished hypothesis."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from gptk.hooks.results import Generation, Hypothesis, TopTokens
from gptk.text.tokenizer import Tokenizer


class TextStream:
    """Token bytes in, text out: whole characters only, and never part of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """The text that is certain once these bytes have come."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        cuts = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            return self._release(min(cuts))
        return self._release(len(self._held) - self._open_stop())

    def each(self, data: Iterable[bytes]) -> list[str]:
        """The text that is certain after each of several pushes."""
        return [self.push(part) for part in data]

    def flush(self) -> str:
        """The rest: what was held back as the possible beginning of a stop string.

        Bytes that begin a character but do not complete it are dropped.
        """
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _open_stop(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(1, min(len(stop) - 1, len(self._held)) + 1):
                if self._held.endswith(stop[:size]):
                    longest = max(longest, size)
        return longest


def make_generation(
    row: Hypothesis,
    *,
    score: float,
    prompt: Sequence[int],
    seed: int,
    ordinal: int,
    tokenizer: Tokenizer | None,
    stop: Sequence[str],
    top_logprobs: bool = False,
    is_complete: Callable[[list[int]], bool | None] = lambda tokens: None,
    parse: Callable[[str], object] = lambda text: None,
) -> Generation:
    """The public result of a finished hypothesis. Without a tokenizer the text is empty.

    parse: called with the text if it is complete.
    """
    links = row.chain()
    if row.reason == "eos":
        links.pop()
    text, texts = "", [""] * len(links)
    if tokenizer is not None:
        data = [tokenizer.token_bytes(link.token) for link in links]
        stream = TextStream(stop)
        text = "".join(map(stream.push, data)) + stream.flush()
        texts = _texts(data, text)
        if stream.stopped:
            # Keep the tokens up to the one that completes the text.
            sizes = accumulate(map(len, TextStream(()).each(data)), initial=0)
            links = links[: sum(size < len(text) for size in sizes)]
    assert row.reason is not None
    tokens = [link.token for link in links]
    complete = is_complete(tokens)
    return Generation(
        text=text,
        tokens=tokens,
        complete=complete,
        token_logprobs=[link.logprob for link in links],
        score=score,
        finish_reason=row.reason,
        prompt_tokens=list(prompt),
        seed=seed,
        ordinal=ordinal,
        token_texts=texts[: len(links)],
        top_logprobs=[with_texts(link.top, tokenizer) for link in links] if top_logprobs else None,
        parsed=parse(text) if complete else None,
    )


def _texts(data: Sequence[bytes], text: str) -> list[str]:
    """The part of a text that each token adds. data: the bytes of each token."""
    texts = []
    size = 0
    for piece in TextStream(()).each(data):
        texts.append(text[size : size + len(piece)])
        size += len(piece)
    return texts


def with_texts(top: TopTokens | None, tokenizer: Tokenizer | None) -> TopTokens:
    """The likeliest tokens of a step with the text of each."""
    assert top is not None
    if tokenizer is None:
        return top
    return TopTokens(
        *(tuple(t._replace(text=_text_of(t.token, tokenizer)) for t in tokens) for tokens in top)
    )


def _text_of(token: int, tokenizer: Tokenizer) -> str:
    """The text of a token within a text; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.token_bytes(token).decode("utf-8", errors="replace")
