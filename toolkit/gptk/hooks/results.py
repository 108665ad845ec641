"""Results: a hypothesis is a row while it is decoded, a generation is what the caller gets."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "time", "interrupted"]
"""Why a row ended: end-of-text token, stop string or condition, token limit or full window, time
limit, or the user's interrupt."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A row's new tokens, as a chain of links, so that beams share their common beginning."""

    prompt: int
    sample: int = 0
    group: int = 0
    parent: "Hypothesis | None" = field(default=None, repr=False, compare=False)
    token: int = -1
    logprob: float = 0.0
    total: float = 0.0
    """The sum of the log-probabilities of all its tokens."""
    score: float = 0.0
    length: int = 0
    tail: bytes = b""
    """The last bytes of the text, which may be the beginning of a stop string."""
    reason: FinishReason | None = None

    def chain(self) -> "list[Hypothesis]":
        """The links from the first new token to this one."""
        return self.since(0)

    def since(self, length: int) -> "list[Hypothesis]":
        """The links that come after the first `length` new tokens."""
        links = []
        link = self
        while link.length > length and link.parent is not None:
            links.append(link)
            link = link.parent
        return links[::-1]


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt, and the others of the same prompt."""

    text: str
    """The continuation, without the prompt and EOS; it ends before a stop string."""
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
