"""Results: a hypothesis is a row while it is decoded, a generation is what the caller gets."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic_core import to_jsonable_python

from gptk.errors import counted
from gptk.hooks.html import Part, results_as_html

FinishReason = Literal["eos", "stop", "length", "time", "interrupted"]
"""Why a row ended: end-of-text token, stop string or condition, token limit or full window, time
limit, or the user's interrupt."""


class RankedToken(NamedTuple):
    """A token with its log-probability."""

    token: int
    logprob: float
    text: str = ""
    """Empty without a tokenizer; bytes that are no UTF-8 by themselves are U+FFFD."""


class TopTokens(NamedTuple):
    """The likeliest tokens at a step, likeliest first; see the setting `top_logprobs`.

    They are fewer than asked for where the vocabulary, or what processors leave of it, has fewer.
    """

    before: tuple[RankedToken, ...]
    """By the logits that the processors begin with: the model's, unless the sampler has others."""
    after: tuple[RankedToken, ...]
    """By the logits after the processors, from which the sampler chose."""


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
    top: TopTokens | None = None
    """The likeliest tokens at the step of `token`, if they were asked for."""

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


@dataclass(frozen=True, repr=False)
class Generation:
    """One continuation of a prompt, and the others of the same prompt.

    In a notebook it is shown as its text, with improbable tokens coloured.
    """

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
    ordinal: int = 0
    """The number of its request: with the seed and the prompt, what drawn tokens depend on."""
    complete: bool | None = None
    """With a constraint: whether the text satisfies it as it stands, and not only as the beginning
    of a longer one."""
    alternatives: list["Generation"] = field(default_factory=list)
    """The 2nd to n-th result: best first for beams (of which there may be fewer than n), in the
    order of drawing for samples."""
    token_texts: list[str] = field(default_factory=list)
    """The part of `text` that each of `tokens` adds; empty for a token that ends within a
    character. Joined they are `text`."""
    top_logprobs: list[TopTokens] | None = None
    """With the setting `top_logprobs`: for each of `tokens` the likeliest tokens at its step."""
    parsed: Any = None
    """With a constraint that can read its text: the object that the text stands for, such as an
    instance of the schema's pydantic class. None if the text is not complete."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them: numbers that are not finite are None, objects are dicts."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        top = values["top_logprobs"]
        values["top_logprobs"] = top and [
            {name: [token._asdict() for token in tokens] for name, tokens in step._asdict().items()}
            for step in top
        ]
        values["alternatives"] = [other.to_dict() for other in self.alternatives]
        values["parsed"] = to_jsonable_python(self.parsed, fallback=repr, inf_nan_mode="null")
        values["score"] = _finite(self.score)
        values["token_logprobs"] = list(map(_finite, self.token_logprobs))
        return {name: list(v) if isinstance(v, list) else v for name, v in values.items()}

    def __repr__(self) -> str:
        others = f", {len(self.alternatives)} alternatives" if self.alternatives else ""
        return (
            f"Generation({shortened(self.text)}, {counted(len(self.tokens), 'token')}, "
            f"score {self.score:.4f}, finish_reason={self.finish_reason!r}{others})"
        )

    def _repr_html_(self) -> str:
        results = [self, *self.alternatives]
        return results_as_html([(result._about(), result._parts()) for result in results])

    def _about(self) -> str:
        incomplete = ", incomplete" if self.complete is False else ""
        return (
            f"{counted(len(self.tokens), 'token')}, score {self.score:.4f}, "
            f"finish reason: {self.finish_reason}{incomplete}"
        )

    def _parts(self) -> Iterator[Part]:
        texts = self.token_texts or [""] * len(self.tokens)
        tops: Sequence[TopTokens | None] = self.top_logprobs or [None] * len(self.tokens)
        entries = zip(self.tokens, texts, self.token_logprobs, tops, strict=True)
        for token, text, logprob, top in entries:
            note = f"token {token} {text!r}: p = {_p(logprob)}, log p = {logprob:.3f}"
            if top is not None:
                note += f"\nbefore processors: {_ranked(top.before)}"
                note += f"\nafter processors: {_ranked(top.after)}"
            yield Part(text, logprob, note)


def _ranked(tokens: Sequence[RankedToken]) -> str:
    return ", ".join(f"{ranked.text!r} {_p(ranked.logprob)}" for ranked in tokens)


def _p(logprob: float) -> str:
    return f"{math.exp(logprob):.3g}"


def shortened(text: str, most: int = 60) -> str:
    """A text in quotes on one line, cut after `most` characters.

    >>> shortened("one" * 40, 10)
    "'oneoneoneo…'"
    """
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
