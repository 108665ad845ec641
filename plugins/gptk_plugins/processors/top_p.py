"""Top-p or nucleus (Holtzman et al. 2020): the smallest set of likeliest tokens reaching mass p.

A full sort of a vocabulary of 50,000 takes as long as several layers of a small model. The
nucleus nearly always lies in the few hundred likeliest tokens, so those are sorted first, and
more only where they hold less mass than p.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk

FIRST = 256
"""Tokens sorted at first; topk(256) of 49,152 costs about a thirtieth of a sort."""


class TopP(gptk.LogitsProcessor):
    """Keeps the fewest most likely tokens that reach p together, and ties with the last."""

    name = "top-p"
    example = "p=0.9"

    p: float = Field(0.9, gt=0, le=1, description="the probability to reach; 1 keeps all")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        vocabulary = logits.shape[-1]
        if self.p == 1:
            return logits
        size = min(FIRST, vocabulary)
        total = logits.logsumexp(dim=-1, keepdim=True)
        while True:
            top = logits.topk(size, dim=-1)
            mass = (top.values - total).exp().cumsum(dim=-1)
            if size == vocabulary or bool((mass[:, -1] >= self.p).all()):
                break
            size = min(16 * size, vocabulary)
        # A token stays if those before it fall short of p; the first always does. Ties with the
        # last stay too: which of them comes first is an accident of the sort.
        kept = torch.ones_like(mass, dtype=torch.bool)
        kept[:, 1:] = mass[:, :-1] < self.p
        least = top.values.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
        return logits.masked_fill(logits < least, -torch.inf)
