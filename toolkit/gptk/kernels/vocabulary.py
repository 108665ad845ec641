"""Passes over the logits of a whole vocabulary. See gptk.vocabulary and gptk.session.random."""

import torch
from torch import Tensor

from gptk.kernels.build import library


def cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """-log softmax(logits)[target] of each row: (rows,), float32.

    logits: (rows, vocab), bfloat16 or float32, each row contiguous; targets: (rows,) int64. Unless
    scale is 0, logits are overwritten with scale · their gradient.
    """
    targets = targets.contiguous()
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    library().gptk_cross_entropy(
        *(logits.dtype == torch.bfloat16, logits.data_ptr(), targets.data_ptr()),
        *(losses.data_ptr(), scale, *logits.shape, logits.stride(0)),
    )
    return losses


def exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """Exponential noise: (count,) float32. As gptk.session.random.exponential.

    keys: (2,), one for all tokens, or (count, 2), one for each; tokens: (count,). All int32.
    """
    keys, tokens = keys.contiguous(), tokens.contiguous()
    y = tokens.new_empty(tokens.shape, dtype=torch.float32)
    library().gptk_exponential(
        *(keys.data_ptr(), keys.stride(0) if keys.dim() == 2 else 0, tokens.data_ptr()),
        *(y.data_ptr(), len(tokens)),
    )
    return y


def softmax_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the highest number, Σ w and Σ w · (x - highest), where w = exp(x - highest).

    x: (rows, size), float32. Returns (rows, 1) each.
    """
    x = x.contiguous()
    highest, weight, weighted = x.new_empty(3, len(x), 1).unbind()
    library().gptk_softmax_sums(
        *(x.data_ptr(), highest.data_ptr(), weight.data_ptr(), weighted.data_ptr(), *x.shape)
    )
    return highest, weight, weighted


def last_key(keys: Tensor, logits: Tensor, p: float) -> Tensor:
    """gptk.vocabulary.last_key, by the kernel."""
    same = keys is logits  # the kernel compares their pointers, and then saves a pass
    logits = logits.contiguous()
    keys = logits if same else keys.contiguous()
    y = keys.new_empty(len(keys), 1)
    library().gptk_last_key(keys.data_ptr(), logits.data_ptr(), p, y.data_ptr(), *keys.shape)
    return y


def keep_from(x: Tensor, least: Tensor, keys: Tensor) -> Tensor:
    """gptk.vocabulary.keep_from, by the kernel."""
    x, keys = x.contiguous(), keys.expand_as(x).contiguous()
    least = least.expand(len(x), 1).contiguous()
    y = torch.empty_like(x)
    library().gptk_keep_from(
        *(x.data_ptr(), least.data_ptr(), keys.data_ptr(), y.data_ptr(), *x.shape)
    )
    return y


def top(x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """gptk.vocabulary.top, equal numbers in the order of their tokens; None if there is a NaN."""
    x = x.contiguous()
    values, tokens = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)
    found = x.new_empty(len(x), dtype=torch.int32)
    library().gptk_top(
        *(x.data_ptr(), values.data_ptr(), tokens.data_ptr(), found.data_ptr(), *x.shape, k)
    )
    return (values, tokens) if all(found.tolist()) else None


def draw(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """gptk.session.random.draw, by the kernel: tokens and their log-probabilities, (rows,) each.

    logits: (rows, vocab), float32; keys: (1 or rows, 2), int32.
    """
    logits, keys = logits.contiguous(), keys.expand(len(logits), 2).contiguous()
    tokens, logprobs = keys.new_empty(len(keys), dtype=torch.int64), logits.new_empty(len(keys))
    library().gptk_draw(
        *(logits.data_ptr(), keys.data_ptr(), tokens.data_ptr(), logprobs.data_ptr()),
        *logits.shape,
    )
    return tokens, logprobs


def permutation(size: int, seed: int, count: int) -> Tensor:
    """gptk.vocabulary.permutation, by the kernel, of fewer than 2²⁷ numbers."""
    y = torch.empty(count, dtype=torch.int32)
    library().gptk_permutation(seed & 0xFFFFFFFF, size, count, y.data_ptr())
    return y
