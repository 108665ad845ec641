r"""Eta sampling (Hewitt et al. 2022): only tokens with $p(v) \ge \eta$ and the likeliest stay.

$$\eta = \min\left(\varepsilon,\ \sqrt{\varepsilon}\, e^{-H}\right)$$

$$H = -\sum_v p(v) \log p(v)$$

with the entropy $H$ in nats: where the model is unsure, less likely tokens stay than with epsilon
sampling.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

import gptk


class Eta(gptk.LogitsProcessor):
    """Keeps tokens above a probability that falls with the entropy, and the most likely one."""

    name = "eta"
    for_sampling = True
    example = "epsilon=0.001"
    positional = "epsilon"
    other_names = {"eta_cutoff": "epsilon"}

    epsilon: float = Field(
        0.0003,
        gt=0,
        lt=1,
        description="the least probability where entropy is low; the paper has 0.0003 to 0.004",
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        probabilities = logits.softmax(dim=-1)
        eta = (math.sqrt(self.epsilon) * (-gptk.vocabulary.entropy(logits)).exp()).clamp(
            max=self.epsilon
        )
        # η is at most the highest probability, which is at least exp(-H); rounding can break that.
        least = torch.minimum(eta, probabilities.amax(dim=-1, keepdim=True))
        return gptk.vocabulary.keep_from(logits, least, probabilities)
