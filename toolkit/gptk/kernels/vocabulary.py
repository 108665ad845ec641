"""Passes over the logits of a whole vocabulary. See gptk.vocabulary and gptk.session.random.

All tensors are on the CPU.
"""

from torch import Tensor

from gptk.kernels.build import library


def cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """-log softmax(logits)[target] of each row: (rows,), float32.

    logits: (rows, vocab), bfloat16 or float32, each row contiguous; targets: (rows,) int64. Unless
    scale is 0, logits are overwritten with scale · their gradient; so rows must not overlap.
    """
    losses: Tensor = library().cross_entropy(logits, targets, scale)
    return losses


def exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """Exponential noise: (count,) float32. As gptk.session.random.exponential.

    keys: (2,), one for all tokens, or (count, 2), one for each; tokens: (count,). All int32.
    """
    y: Tensor = library().exponential(keys, tokens)
    return y


def softmax_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the highest number, Σ w and Σ w · (x - highest), where w = exp(x - highest).

    x: (rows, size), float32. Returns (rows, 1) each.
    """
    sums: tuple[Tensor, Tensor, Tensor] = library().softmax_sums(x)
    return sums


def last_key(keys: Tensor, logits: Tensor, p: float) -> Tensor:
    """gptk.vocabulary.last_key, by the kernel."""
    if keys is logits:  # the kernel compares their addresses, and then saves a pass
        keys = logits = logits.contiguous()
    y: Tensor = library().last_key(keys, logits, p)
    return y


def keep_from(x: Tensor, least: Tensor, keys: Tensor) -> Tensor:
    """gptk.vocabulary.keep_from, by the kernel."""
    y: Tensor = library().keep_from(x, least.expand(len(x), 1), keys.expand_as(x))
    return y


def top(x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """gptk.vocabulary.top, equal numbers in the order of their tokens; None if there is a NaN.

    k: at most vocab.
    """
    values, tokens, found = library().top(x, k)
    return (values, tokens) if all(found.tolist()) else None


def draw(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """gptk.session.random.draw, by the kernel: tokens and their log-probabilities, (rows,) each.

    logits: (rows, vocab), float32, vocab at least 1; keys: (1 or rows, 2), int32.
    """
    drawn: tuple[Tensor, Tensor] = library().draw(logits, keys.expand(len(logits), 2))
    return drawn


def permutation(size: int, seed: int, count: int) -> Tensor:
    """gptk.vocabulary.permutation, by the kernel. size: below 2²⁷; count: at most size."""
    y: Tensor = library().permutation(size, seed & 0xFFFFFFFF, count)
    return y
