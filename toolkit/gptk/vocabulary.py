"""Passes over the logits of a whole vocabulary, for samplers and processors.

A vocabulary has 50,000 to 250,000 tokens, and on a CPU each of PyTorch's passes over it takes as
long as a good part of a layer of a small model. Here each function is one or two passes of
gptk's own, see gptk.kernels; elsewhere, and for what needs a gradient, PyTorch's. All take float32
and treat each row by itself. None changes what it is given.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptk import kernels


class Top(NamedTuple):
    """Of each row the largest numbers, in falling order, and where they are."""

    values: Tensor
    tokens: Tensor


def top(x: Tensor, k: int) -> Top:
    """The k largest numbers of each row, NaN first; equal ones in any order.

    x: (rows, vocab). Returns (rows, k) each. Raises RuntimeError for k beyond vocab.
    """
    if (
        0 < k <= min(_FEW_OF_TOP, x.shape[-1])
        and _suits(x)
        and (found := kernels.top(x, k)) is not None
    ):
        return Top(*found)
    return Top(*x.topk(k, dim=-1))


def logprobs_of(some: Tensor, logits: Tensor) -> Tensor:
    """The log-probabilities of some logits: some - log Σ exp(logits), to the last digits.

    some: (rows, n), of the rows of logits (rows, vocab). Returns (rows, n).
    """
    highest, weight, _ = _sums(logits)
    return some - highest - weight.log()


def entropy(logits: Tensor) -> Tensor:
    """-Σ p·log p of each row, (rows, 1), in nats; tokens that were taken out count as 0."""
    _, weight, weighted = _sums(logits)
    return weight.log() - weighted / weight


def mean(logits: Tensor) -> Tensor:
    """Σ p·logit of each row, (rows, 1): log Σ exp(logits) less the entropy."""
    highest, weight, weighted = _sums(logits)
    return highest + weighted / weight


def permutation(size: int, seed: int, count: int) -> Tensor:
    """A random list of tokens: the first of torch.randperm(size) by a CPU's generator.

    size: of the vocabulary; seed: the generator's, at least 0. Returns (count,) int32, on the CPU.
    Where gptk's kernels run, the rest of the permutation is not made.
    """
    if size < 2**27 and kernels.available():
        return kernels.permutation(size, seed, count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator, dtype=torch.int32)[:count]


def _sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest logit, Σ w and Σ w · (logit - highest), where w = exp(logit - highest)."""
    if _suits(logits):
        return kernels.sums(logits)
    highest = logits.amax(dim=-1, keepdim=True)
    below = logits - highest
    weights = below.exp()
    weighted = (weights * below).nansum(dim=-1, keepdim=True)  # 0 · -inf counts as 0
    return highest, weights.sum(dim=-1, keepdim=True), weighted


def keep_from(logits: Tensor, least: Tensor, keys: Tensor | None = None) -> Tensor:
    """Logits whose keys are at least `least` as they are, -inf for the others.

    least: (rows, 1), or (1, 1) for all rows; keys: (rows, vocab), by default the logits themselves.
    """
    keys = logits if keys is None else keys
    if _suits(logits) and _suits(least) and _suits(keys):
        return kernels.keep_from(logits, least, keys)
    return torch.where(keys < least, -torch.inf, logits)


def last_key(keys: Tensor, logits: Tensor, p: float) -> Tensor:
    """The key of the token at which tokens in the order of falling keys reach probability p.

    keys: (rows, vocab), log-probabilities or differences of such, or the logits; p: below 1.
    Returns (rows, 1): what has at least that key is the smallest set, and ties with its last token.
    Which of tied tokens comes first is an accident of the sort, so it must not decide. Where
    rounding keeps a row short of p it is the lowest key.
    """
    if _suits(keys) and _suits(logits) and keys.shape == logits.shape:
        return kernels.last_key(keys, logits, p)
    probabilities = logits.softmax(dim=-1)
    if keys.is_cpu and not (keys.requires_grad or logits.requires_grad):
        pairs = zip(keys.numpy(), probabilities.numpy(), strict=True)
        return keys.new_tensor([[_last_key(key, q, p)] for key, q in pairs])
    ordered = keys.sort(dim=-1, descending=True, stable=True)
    mass = probabilities.gather(-1, ordered.indices).cumsum(dim=-1)
    last = (mass < p).sum(dim=-1, keepdim=True).clamp(max=keys.shape[-1] - 1)
    return ordered.values.gather(-1, last)


def _suits(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.dim() == 2
        and not x.requires_grad
        and not torch.compiler.is_compiling()
        and kernels.available()
    )


_FEW_OF_TOP = 128
"""More are found sooner by PyTorch."""

# Without gptk's kernels: what is looked for nearly always lies among the few hundred tokens whose
# keys are near the highest, so those alone are sorted at first. Where they hold less probability
# than asked for, all tokens are counted into bins by their keys, and the one bin in which the sum
# reaches it is sorted. A full sort of 50,000 takes as long as several layers of a small model.

_Floats = npt.NDArray[np.float32]

_DEPTHS = (8, 12)
"""How far below the highest key to look first. Among those within 8 nats SmolLM2 has 90 % of its
probability at 59 of 60 places of an English text, with 320 tokens to sort."""
_FEW = 4096
"""Tokens that are sorted sooner than counted."""
_BINS = 1024


def _last_key(keys: _Floats, probabilities: _Floats, p: float) -> float:
    """`last_key` for one row. Not a number where the keys are none."""
    highest = keys.max()
    for depth in _DEPTHS:
        near = np.flatnonzero(keys >= highest - np.float32(depth))
        if len(near) > _FEW:
            break
        if probabilities[near].sum(dtype=np.float64) >= p:
            return _last_among(near, keys, probabilities, p, 0)
    # Tokens so unlikely that the others reach p without them are in the last bin, whatever their
    # keys; the bins before are equally wide.
    lowest = keys[probabilities > (1 - p) / len(keys)].min(initial=highest)
    if not lowest < highest:  # all that count tie, or there are none
        return float(highest)
    bins = np.minimum((highest - keys) * np.float32((_BINS - 1) / (highest - lowest)), _BINS)
    bins = bins.astype(np.int32)
    mass = np.bincount(bins, weights=probabilities, minlength=_BINS + 1).cumsum()
    found = int(np.searchsorted(mass, p))
    if found > _BINS:
        return float(keys.min())
    before = mass[found - 1] if found else 0
    return _last_among(np.flatnonzero(bins == found), keys, probabilities, p, before)


def _last_among(
    tokens: npt.NDArray[np.intp], keys: _Floats, probabilities: _Floats, p: float, before: float
) -> float:
    """The key of the one of these tokens that completes p; those ahead of them have `before`."""
    order = tokens[np.argsort(-keys[tokens])]  # ties in any order: they share the key
    mass = before + np.cumsum(probabilities[order], dtype=np.float64)
    return float(keys[order[min(int(np.searchsorted(mass, p)), len(order) - 1)]])
