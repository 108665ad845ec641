"""What the contracts of decoding share: models to decode with, runs, comparisons of logits."""

import functools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import gptk
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


def decode(lm: gptk.LanguageModel, prompts: list[list[int]], **settings: Any) -> list[Any]:
    """For each prompt its results, as (tokens, finish reason); the message if decoding fails."""
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
