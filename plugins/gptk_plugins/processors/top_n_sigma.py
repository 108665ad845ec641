r"""Top-nσ (Tang et al. 2024): only tokens within n standard deviations of the largest logit stay.

$$v \text{ stays} \iff \text{logit}(v) \ge \max_w \text{logit}(w) - n \sigma$$

$\sigma$ is the standard deviation of the row's logits that are not masked yet, $\sqrt{\sum (x -
\text{mean})^2 / N}$ as in llama.cpp. Both sides scale with $1/T$, so the temperature does not
change which tokens stay.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class TopNSigma(gptk.LogitsProcessor):
    """Keeps tokens whose logit is within n standard deviations of the highest."""

    name = "top-n-sigma"
    for_sampling = True
    example = "n=1.5"
    positional = "n"

    n: float = Field(1.0, gt=0, description="how many standard deviations below the highest")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        below = logits - logits.amax(dim=-1, keepdim=True)
        total, count = below.sum(dim=-1, keepdim=True), logits.new_tensor(logits.shape[-1])
        if bool(total.isfinite().all()):
            deviation = below - total / count
        else:  # some tokens are masked: a few more passes over the vocabulary
            finite = below > -torch.inf
            unmasked, count = torch.where(finite, below, 0), finite.sum(dim=-1, keepdim=True)
            mean = unmasked.sum(dim=-1, keepdim=True) / count
            deviation = torch.where(finite, unmasked - mean, 0)
        sigma = (deviation.square_().sum(dim=-1, keepdim=True) / count).sqrt()
        return torch.where(below < -self.n * sigma, -torch.inf, logits)
