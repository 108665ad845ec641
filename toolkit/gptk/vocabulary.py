"""Passes over the logits of a whole vocabulary, for samplers and processors.

A vocabulary has 50,000 to 250,000 tokens, and on a CPU each of PyTorch's passes over it takes as
long as a good part of a layer of a small model. Each function here is one or two passes of gptk's
kernels; or PyTorch's operations, where these kernels cannot run, and for tensors that need a
gradient. All take float32 and compute each row on its own. None modifies its arguments.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptk import kernels


class Top(NamedTuple):
    """The largest numbers of each row, in falling order, and their token ids. (rows, k) each."""

    values: Tensor
    tokens: Tensor


def top(x: Tensor, k: int) -> Top:
    """The k largest numbers of each row, NaN first; equal ones in any order.

    x: (rows, vocab). Returns (rows, k) each. Raises RuntimeError for k beyond vocab.
    """
    if (
        0 < k <= min(_MAX_K, x.shape[-1])
        and _can_run(x)
        and (found := kernels.top(x, k)) is not None
    ):
        return Top(*found)
    return Top(*x.topk(k, dim=-1))


def logprobs_of(selected: Tensor, logits: Tensor) -> Tensor:
    """The log-probabilities of selected logits: selected - log Σ exp(logits).

    selected: (rows, n), logits of the same rows of logits (rows, vocab). Returns (rows, n).
    """
    highest, weight, _ = _sums(logits)
    return selected - highest - weight.log()


def entropy(logits: Tensor) -> Tensor:
    """-Σ p·log p of each row, (rows, 1), in nats. Masked tokens, with logit -inf, count as 0."""
    _, weight, weighted = _sums(logits)
    return weight.log() - weighted / weight


def mean(logits: Tensor) -> Tensor:
    """Σ p·logit of each row, (rows, 1). This is log Σ exp(logits) - entropy(logits)."""
    highest, weight, weighted = _sums(logits)
    return highest + weighted / weight


def permutation(size: int, seed: int, count: int) -> Tensor:
    """Distinct random tokens: the first `count` of torch.randperm(size) on a CPU.

    size: of the vocabulary; seed: for the random generator, at least 0. Returns (count,) int32,
    on the CPU. gptk's kernel does not compute the rest of the permutation.
    """
    if size < 2**27 and kernels.available():
        return kernels.permutation(size, seed, count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator, dtype=torch.int32)[:count]


def _sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest logit, Σ w and Σ w · (logit - highest), where w = exp(logit - highest)."""
    if _can_run(logits):
        return kernels.softmax_sums(logits)
    highest = logits.amax(dim=-1, keepdim=True)
    below = logits - highest
    weights = below.exp()
    weighted = (weights * below).nansum(dim=-1, keepdim=True)  # 0 · -inf counts as 0
    return highest, weights.sum(dim=-1, keepdim=True), weighted


def keep_from(logits: Tensor, least: Tensor, keys: Tensor | None = None) -> Tensor:
    """The logits, with -inf for tokens whose keys are below `least`. Returns (rows, vocab).

    least: (rows, 1), or (1, 1) for all rows; keys: (rows, vocab), by default the logits themselves.
    """
    keys = logits if keys is None else keys
    if _can_run(logits) and _can_run(least) and _can_run(keys):
        return kernels.keep_from(logits, least, keys)
    return torch.where(keys < least, -torch.inf, logits)


def last_key(keys: Tensor, logits: Tensor, p: float) -> Tensor:
    """The key at which the tokens, taken by falling keys, first have probability p together.

    keys: (rows, vocab): the logits, log-probabilities, or differences of log-probabilities; logits:
    (rows, vocab); p: below 1. Returns (rows, 1). Tokens with at least that key are the smallest set
    that reaches p, and all tokens that tie with its last one, as the order of ties is an accident
    of sorting. The lowest key if rounding keeps a row short of p.
    """
    if _can_run(keys) and _can_run(logits) and keys.shape == logits.shape:
        return kernels.last_key(keys, logits, p)
    probabilities = logits.softmax(dim=-1)
    if keys.is_cpu and not (keys.requires_grad or logits.requires_grad):
        pairs = zip(keys.numpy(), probabilities.numpy(), strict=True)
        return keys.new_tensor([[_last_key(key, q, p)] for key, q in pairs])
    ordered = keys.sort(dim=-1, descending=True, stable=True)
    mass = probabilities.gather(-1, ordered.indices).cumsum(dim=-1)
    last = (mass < p).sum(dim=-1, keepdim=True).clamp(max=keys.shape[-1] - 1)
    return ordered.values.gather(-1, last)


def _can_run(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.dim() == 2
        and not x.requires_grad
        and not torch.compiler.is_compiling()
        and kernels.available()
    )


_MAX_K = 128
"""For a larger k, PyTorch's topk is faster."""

# `last_key` without gptk's kernels. The token is nearly always among the few hundred tokens whose
# keys are near the highest, so only these are sorted at first. If their probability is below p, all
# tokens are counted into bins by their keys, and only the bin in which the sum reaches p is sorted.
# Sorting all 50,000 would take as long as several layers of a small model.

_Floats = npt.NDArray[np.float32]

_DEPTHS = (8, 12)
"""Distances below the highest key, in nats, to search first. Within 8 nats SmolLM2 has 90 % of the
probability at 59 of 60 positions of an English text, with 320 tokens to sort."""
_MAX_SORTED = 4096
"""Up to so many tokens, sorting is faster than counting into bins."""
_BINS = 1024


def _last_key(keys: _Floats, probabilities: _Floats, p: float) -> float:
    """`last_key` for one row. NaN if a key is NaN."""
    highest = keys.max()
    for depth in _DEPTHS:
        near = np.flatnonzero(keys >= highest - np.float32(depth))
        if len(near) > _MAX_SORTED:
            break
        if probabilities[near].sum(dtype=np.float64) >= p:
            return _last_among(near, keys, probabilities, p, 0)
    # The last bin is for tokens so improbable that the others reach p without them, whatever their
    # keys. The bins before it are equally wide.
    lowest = keys[probabilities > (1 - p) / len(keys)].min(initial=highest)
    if not lowest < highest:  # all tokens that count tie, or a key is NaN
        return float(highest)
    bins = np.minimum((highest - keys) * np.float32((_BINS - 1) / (highest - lowest)), _BINS)
    bins = bins.astype(np.int32)
    mass = np.bincount(bins, weights=probabilities, minlength=_BINS + 1).cumsum()
    last_bin = int(np.searchsorted(mass, p))
    if last_bin > _BINS:
        return float(keys.min())
    before = mass[last_bin - 1] if last_bin else 0
    return _last_among(np.flatnonzero(bins == last_bin), keys, probabilities, p, before)


def _last_among(
    tokens: npt.NDArray[np.intp], keys: _Floats, probabilities: _Floats, p: float, before: float
) -> float:
    """The key at which these tokens reach p. before: the probability of tokens with higher keys."""
    order = tokens[np.argsort(-keys[tokens])]  # ties in any order: they share the key
    mass = before + np.cumsum(probabilities[order], dtype=np.float64)
    return float(keys[order[min(int(np.searchsorted(mass, p)), len(order) - 1)]])
