"""The smallest prefix of an order that reaches a probability, without a sort of the vocabulary.

A full sort of a vocabulary of 50,000 takes as long as several layers of a small model. What is
looked for nearly always lies in the first few hundred tokens, so those are sorted first. Where they
hold less probability than asked for, the others are counted into bins by their keys, and the one
bin in which the sum reaches it is sorted: a tenth of a sort's time, however flat the distribution.
"""

import torch
from torch import Tensor

FIRST = 256
"""Tokens sorted at first; topk(256) of 49,152 costs about a thirtieth of a sort."""
BINS = 1024


def last_key(keys: Tensor, probabilities: Tensor, p: float) -> Tensor:
    """The key of the token at which tokens in the order of falling keys reach p together.

    keys, probabilities: (rows, vocab); p: below 1. Returns (rows, 1): what has at least that key
    is the smallest set, and ties with its last token. Which of tied tokens comes first is an
    accident of the sort, so it must not decide. Where rounding keeps a row short of p, all have
    at least its key.
    """
    vocabulary = keys.shape[-1]
    top = keys.topk(min(FIRST, vocabulary), dim=-1)
    mass = probabilities.gather(-1, top.indices).cumsum(dim=-1)
    # The last token is the first with which the sum does not fall short.
    short = (mass < p).sum(dim=-1, keepdim=True)
    last = top.values.gather(-1, short.clamp(max=top.values.shape[-1] - 1))
    if top.values.shape[-1] < vocabulary:
        more = (short[:, 0] == top.values.shape[-1]).nonzero()[:, 0]
        if len(more):
            # By themselves: what a row gets must not depend on its neighbours.
            last[more] = _last_key_from(last[more], keys[more], probabilities[more], p)
    return last


def _last_key_from(first: Tensor, keys: Tensor, probabilities: Tensor, p: float) -> Tensor:
    """The same for rows in which the keys from `first` on, (rows, 1), fall short of p."""
    # Bin 0 has the keys from `first` on, the last bin those of tokens so unlikely that all the
    # others reach p without them; the bins between are equally wide.
    likely = probabilities > (1 - p) / keys.shape[-1]
    lowest = torch.where(likely, keys, torch.inf).amin(dim=-1, keepdim=True)
    width = ((first - lowest) / (BINS - 1)).clamp(min=torch.finfo(keys.dtype).tiny)
    bins = ((first - keys) / width).ceil_().clamp_(0, BINS).long()
    # Sums of 50,000 float32 probabilities lose digits.
    wide = torch.float32 if keys.device.type == "mps" else torch.float64
    probabilities = probabilities.to(wide)
    mass = probabilities.new_zeros(len(keys), BINS + 1).scatter_add_(-1, bins, probabilities)
    mass = mass.cumsum(dim=-1)
    found = (mass < p).sum(dim=-1, keepdim=True).clamp(max=BINS)
    before = torch.where(found > 0, mass.gather(-1, (found - 1).clamp(min=0)), 0)
    inside = bins == found
    size = max(1, int(inside.sum(dim=-1).max()))
    top = torch.where(inside, keys, -torch.inf).topk(size, dim=-1)
    mass = before + probabilities.gather(-1, top.indices).cumsum(dim=-1)
    return top.values.gather(-1, (mass < p).sum(dim=-1, keepdim=True).clamp(max=size - 1))
