"""Passes over the logits of a whole vocabulary. See gptk.vocabulary and gptk.session.random.

All tensors are on the CPU. All functions raise ValueError for other arguments than they document.
"""

import torch
from torch import Tensor

from gptk.kernels.arguments import BFLOAT16, FLOAT32, are, are_floats, fail, refuse
from gptk.kernels.build import library


def cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """-log softmax(logits)[target] of each row: (rows,), float32.

    logits: (rows, vocab), bfloat16 or float32, each row contiguous; targets: (rows,) int64. Unless
    scale is 0, logits are overwritten with scale · their gradient; so rows must not overlap.
    """
    targets = targets.contiguous()
    if (
        logits.dim() != 2
        or not are_floats(logits)
        or (logits.stride(1) != 1 and logits.shape[1] > 1)
        or (logits.stride(0) < logits.shape[1] and logits.shape[0] > 1)
        or targets.shape != logits.shape[:1]
        or not are(torch.int64, targets)
    ):
        refuse("cross_entropy", logits=logits, targets=targets)
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    if status := library().gptk_cross_entropy(
        *(logits.dtype is BFLOAT16, logits.data_ptr(), targets.data_ptr()),
        *(losses.data_ptr(), scale, *logits.shape, logits.stride(0)),
    ):
        fail(status)
    return losses


def exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """Exponential noise: (count,) float32. As gptk.session.random.exponential.

    keys: (2,), one for all tokens, or (count, 2), one for each; tokens: (count,). All int32.
    """
    keys, tokens = keys.contiguous(), tokens.contiguous()
    if (
        tokens.dim() != 1
        or (keys.shape != (2,) and keys.shape != (len(tokens), 2))
        or not are(torch.int32, keys, tokens)
    ):
        refuse("exponential", keys=keys, tokens=tokens)
    y = tokens.new_empty(tokens.shape, dtype=torch.float32)
    if status := library().gptk_exponential(
        *(keys.data_ptr(), keys.dim() == 2, tokens.data_ptr()),
        *(y.data_ptr(), len(tokens)),
    ):
        fail(status)
    return y


def softmax_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the highest number, Σ w and Σ w · (x - highest), where w = exp(x - highest).

    x: (rows, size), float32. Returns (rows, 1) each.
    """
    x = x.contiguous()
    if x.dim() != 2 or not are(FLOAT32, x):
        refuse("softmax_sums", x=x)
    highest, weight, weighted = x.new_empty(3, len(x), 1).unbind()
    if status := library().gptk_softmax_sums(
        *(x.data_ptr(), highest.data_ptr(), weight.data_ptr(), weighted.data_ptr(), *x.shape)
    ):
        fail(status)
    return highest, weight, weighted


def last_key(keys: Tensor, logits: Tensor, p: float) -> Tensor:
    """gptk.vocabulary.last_key, by the kernel."""
    same = keys is logits  # the kernel compares their pointers, and then saves a pass
    logits = logits.contiguous()
    keys = logits if same else keys.contiguous()
    if logits.dim() != 2 or keys.shape != logits.shape or not are(FLOAT32, keys, logits):
        refuse("last_key", keys=keys, logits=logits)
    y = keys.new_empty(len(keys), 1)
    if status := library().gptk_last_key(
        keys.data_ptr(), logits.data_ptr(), p, y.data_ptr(), *keys.shape
    ):
        fail(status)
    return y


def keep_from(x: Tensor, least: Tensor, keys: Tensor) -> Tensor:
    """gptk.vocabulary.keep_from, by the kernel."""
    x, keys = x.contiguous(), keys.expand_as(x).contiguous()
    least = least.expand(len(x), 1).contiguous()
    if x.dim() != 2 or not are(FLOAT32, x, least, keys):
        refuse("keep_from", x=x, least=least, keys=keys)
    y = torch.empty_like(x)
    if status := library().gptk_keep_from(
        *(x.data_ptr(), least.data_ptr(), keys.data_ptr(), y.data_ptr(), *x.shape)
    ):
        fail(status)
    return y


def top(x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """gptk.vocabulary.top, equal numbers in the order of their tokens; None if there is a NaN.

    k: at most vocab.
    """
    x = x.contiguous()
    if x.dim() != 2 or not 0 <= k <= x.shape[1] or not are(FLOAT32, x):
        refuse("top", x=x, k=k)
    values, tokens = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)
    found = x.new_empty(len(x), dtype=torch.int32)
    if status := library().gptk_top(
        *(x.data_ptr(), values.data_ptr(), tokens.data_ptr(), found.data_ptr(), *x.shape, k)
    ):
        fail(status)
    return (values, tokens) if all(found.tolist()) else None


def draw(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """gptk.session.random.draw, by the kernel: tokens and their log-probabilities, (rows,) each.

    logits: (rows, vocab), float32, vocab at least 1; keys: (1 or rows, 2), int32.
    """
    logits, keys = logits.contiguous(), keys.expand(len(logits), 2).contiguous()
    if (
        logits.dim() != 2
        or not logits.shape[1]
        or not (are(FLOAT32, logits) and are(torch.int32, keys))
    ):
        refuse("draw", logits=logits, keys=keys)
    tokens, logprobs = keys.new_empty(len(keys), dtype=torch.int64), logits.new_empty(len(keys))
    if status := library().gptk_draw(
        *(logits.data_ptr(), keys.data_ptr(), tokens.data_ptr(), logprobs.data_ptr()),
        *logits.shape,
    ):
        fail(status)
    return tokens, logprobs


def permutation(size: int, seed: int, count: int) -> Tensor:
    """gptk.vocabulary.permutation, by the kernel. size: below 2²⁷; count: at most size."""
    if not 0 <= count <= size < 2**27:
        refuse("permutation", size=size, count=count)
    y = torch.empty(count, dtype=torch.int32)
    if status := library().gptk_permutation(seed & 0xFFFFFFFF, size, count, y.data_ptr()):
        fail(status)
    return y
