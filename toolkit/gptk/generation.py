"""What generation and scoring give back, and the text of a hypothesis."""

import codecs
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from gptk.decoding import FinishReason, Hypothesis
from gptk.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt, and the others of the same prompt."""

    text: str
    """The continuation, without the prompt, EOS, and whatever follows from a stop string on."""
    tokens: list[int]
    """Its token ids, without EOS; the last may reach into the stop string."""
    token_logprobs: list[float]
    """The log-probability of each of `tokens` at its step, after all processors."""
    score: float
    """What the sampler ranks by: the sum of log-probabilities, EOS included; for beam search
    divided by length**length_penalty."""
    finish_reason: FinishReason
    prompt_tokens: list[int]
    seed: int
    complete: bool | None = None
    """With a constraint: whether the text satisfies it as it stands, and not only as the beginning
    of a longer one."""
    alternatives: list["Generation"] = field(default_factory=list)
    """The 2nd to n-th result: best first for beams (of which there may be fewer than n), in the
    order of drawing for samples."""


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    tokens: list[int]
    token_logprobs: list[float]
    """For each token but the first: its log-probability after those before it, in nats."""

    @property
    def loss(self) -> float:
        """The mean negative log-probability, in nats a token (cross entropy)."""
        return -math.fsum(self.token_logprobs) / len(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """exp(loss): how many tokens the model hesitates between."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


class TextStream:
    """Token bytes in, text out: whole characters only, and never part of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """The text that `data` makes certain."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        cuts = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            return self._release(min(cuts))
        return self._release(len(self._held) - self._open_stop())

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
    tokenizer: Tokenizer | None,
    stop: Sequence[str],
    is_complete: Callable[[list[int]], bool | None] = lambda tokens: None,
) -> Generation:
    """The public result of a finished hypothesis. Without a tokenizer the text is empty."""
    links = row.chain()
    if row.reason == "eos":
        links.pop()
    text = ""
    if tokenizer is not None:
        data = [tokenizer.token_bytes(link.token) for link in links]
        stream = TextStream(stop)
        text = "".join(map(stream.push, data)) + stream.flush()
        if stream.stopped:
            # Keep the tokens that the text needs: those before it is all there.
            unstopped = TextStream(())
            there = accumulate((len(unstopped.push(part)) for part in data), initial=0)
            links = links[: sum(size < len(text) for size in there)]
    assert row.reason is not None
    tokens = [link.token for link in links]
    return Generation(
        text=text,
        tokens=tokens,
        complete=is_complete(tokens),
        token_logprobs=[link.logprob for link in links],
        score=score,
        finish_reason=row.reason,
        prompt_tokens=list(prompt),
        seed=seed,
    )
