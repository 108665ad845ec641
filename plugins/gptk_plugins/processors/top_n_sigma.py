"""Top-nσ (Tang et al. 2024): only tokens with logit(v) ≥ max logit - n·σ stay.

σ is the standard deviation of the row's logits, of those not taken out already (√(Σ(x - mean)²/N),
as in llama.cpp). Both sides grow with 1/T: the temperature makes no difference to what stays.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class TopNSigma(gptk.LogitsProcessor):
    """Keeps tokens whose logit is within n standard deviations of the highest."""

    name = "top-n-sigma"
    example = "n=1.5"

    n: float = Field(1.0, gt=0, description="how many standard deviations below the highest")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        below = logits - logits.amax(dim=-1, keepdim=True)
        finite = below > -torch.inf
        count = finite.sum(dim=-1, keepdim=True)
        known = torch.where(finite, below, 0)
        deviation = torch.where(finite, known - known.sum(dim=-1, keepdim=True) / count, 0)
        sigma = (deviation.square().sum(dim=-1, keepdim=True) / count).sqrt()
        return logits.masked_fill(below < -self.n * sigma, -torch.inf)
