"""What the contracts of decoding share: models to decode with, runs, comparisons of logits."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import gptk
from gptk.plugins import create
from gptk.testing.models import tiny_gpt, tiny_lm

SEEDS = st.integers(0, 2**16)
PROMPTS = [[0], [1, 2, 3], [255] * 9, [97, 98, 97, 98, 97], [0, 255, 0, 255], [7] * 4]
"""Prompts of unequal lengths, with the first and the last token, repeated tokens and patterns."""
MANY = [[i, i + 1] for i in range(0, 40, 2)]
"""So many prompts that also what happens rarely happens."""


@functools.cache
def lm_without_text(vocabulary: int) -> gptk.LanguageModel:
    """A random model of `vocabulary` tokens, without a tokenizer."""
    return gptk.LanguageModel(tiny_gpt(vocabulary=vocabulary))


@functools.cache
def lm_with_text() -> gptk.LanguageModel:
    """A random model with the 256 bytes and an end of text as tokens."""
    return tiny_lm()


def tokenizer_of(lm: gptk.LanguageModel) -> gptk.Tokenizer | None:
    """The model's tokenizer, or None."""
    try:
        return lm.tokenizer
    except gptk.TokenizerError:
        return None


@dataclass(frozen=True)
class Result:
    """A result of a prompt among the rows of a session."""

    tokens: list[int]
    finish_reason: str
    token_logprobs: list[float]
    score: float


class Together:
    """Prompts decoded as the rows of one session, where a plug-in sees the rows of all.

    `generate_batch` gives each prompt a run of its own instead. Settings are as there, with a
    single stop condition; ordinals: those of the prompts [0, 1, …].
    """

    def __init__(
        self,
        lm: gptk.LanguageModel,
        prompts: Sequence[list[int]],
        *,
        sampler: str | gptk.Sampler = "greedy",
        processors: Sequence[str | gptk.LogitsProcessor] = (),
        draft: str | gptk.Drafter | None = None,
        observers: Sequence[gptk.DecodingObserver] = (),
        max_new_tokens: int = 5,
        seed: int = 0,
        ordinals: Sequence[int] | None = None,
        stop: gptk.StopCondition | None = None,
        use_cache: bool = True,
    ) -> None:
        chosen = create("sampler", sampler, gptk.Sampler)
        tokenizer = tokenizer_of(lm)
        session = gptk.DecodeSession(
            lm.model,
            prompts,
            samples=1 if chosen.competing else chosen.max_rows(1),
            groups=chosen.groups if chosen.competing else 1,
            layers=chosen.hidden_layers(lm.model.config),
            seed=seed,
            use_cache=use_cache,
            ordinals=ordinals,
        )
        limits = gptk.Limits(
            max_new_tokens=max_new_tokens,
            eos=() if tokenizer is None else tuple(tokenizer.eos),
            conditions=() if stop is None else (stop,),
        )
        self._count = len(prompts)
        self.run = gptk.Decoding(
            session,
            chosen,
            [create("processor", processor, gptk.LogitsProcessor) for processor in processors],
            n=1,
            limits=limits,
            tokenizer=tokenizer,
            drafter=None if draft is None else create("drafter", draft, gptk.Drafter),
            observers=observers,
        )

    def step(self) -> bool:
        """Take a step; False if all rows have ended."""
        if self.run.live:
            self.run.step()
        return bool(self.run.live)

    def results(self) -> list[list[Result]]:
        """For each prompt its results, once all rows have ended."""
        self.run.close()
        return [list(map(self._result, self.run.results(i))) for i in range(self._count)]

    def _result(self, row: Any) -> Result:
        links = row.chain()
        if row.reason == "eos":
            links.pop()
        tokens, logprobs = [link.token for link in links], [link.logprob for link in links]
        return Result(tokens, row.reason, logprobs, self.run.rank(row))


def decode_together(
    lm: gptk.LanguageModel, prompts: Sequence[list[int]], **settings: Any
) -> list[list[Result]]:
    """For each prompt its results, decoded as the rows of one session."""
    return decode_in_turns([Together(lm, prompts, **settings)])[0]


def without_numbers(together: Sequence[Sequence[Result]]) -> list[Any]:
    """Results as (tokens, finish reason)."""
    return [[(result.tokens, result.finish_reason) for result in results] for results in together]


def decode_in_turns(calls: Sequence[Together]) -> list[list[list[Result]]]:
    """The results of several sessions, each of which takes a step in turn."""
    going_on = list(calls)
    while going_on:
        going_on = [call for call in going_on if call.step()]
    return [call.results() for call in calls]


def decode(lm: gptk.LanguageModel, prompts: list[list[int]], **settings: Any) -> list[Any]:
    """For each prompt its results by generate_batch, as (tokens, finish reason); the message if
    decoding fails."""
    try:
        outs = lm.generate_batch(prompts, **{"max_new_tokens": 5, **settings})
    except gptk.DecodingError as error:
        return [str(error)] * len(prompts)
    return [
        [(result.tokens, result.finish_reason) for result in (out, *out.alternatives)]
        for out in outs
    ]


def random_logits(rows: int, size: int, seed: int, scale: float) -> Tensor:
    """Random logits, (rows, size), a tenth of them masked."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, size, generator=generator) * scale
    masked = torch.rand(rows, size, generator=generator) < 0.1
    masked[:, 0] = False
    return drawn.masked_fill(masked, -torch.inf)


def worst_logits(size: int) -> list[Tensor]:
    """Logits, (size,) each, that a processor is most likely to get wrong.

    All alike; ties at the top; a single token left, the first or the last; the likeliest tokens
    masked; one token with nearly all probability; rising and falling; huge.
    """
    flat, rising = torch.zeros(size), torch.linspace(-3.0, 3.0, size)
    one_left, last_left = torch.full((size,), -torch.inf), torch.full((size,), -torch.inf)
    one_left[0], last_left[-1] = 1.5, -2.0
    tied = rising.clone()
    tied[[0, size // 2]] = tied.max()
    top_masked = rising.clone()
    top_masked[-max(1, size // 4) :] = -torch.inf
    peaked = torch.full((size,), -20.0)
    peaked[size // 3] = 20.0
    peak_masked = torch.full((size,), -20.0)
    peak_masked[size // 3], peak_masked[-1] = -torch.inf, 5.0
    huge = rising * 1e4
    return [
        *(flat, tied, one_left, last_left, top_masked, peaked, peak_masked, rising, -rising, huge),
        random_logits(1, size, 0, 3.0)[0],
    ]


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether two sets of logits are equal, but for rounding."""
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4)


def difference(first: Tensor, second: Tensor) -> str:
    """The first token at which two sets of logits differ, and both values, in words."""
    unequal = ~torch.isclose(first, second, rtol=1e-4, atol=1e-4)
    if not bool(unequal.any()):
        return "the same"
    index = tuple(unequal.nonzero()[0].tolist())
    return f"{first[index].item():.4f} and {second[index].item():.4f} for token {index[-1]}"
