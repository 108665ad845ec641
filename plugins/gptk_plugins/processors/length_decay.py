r"""Exponential decay length penalty: EOS becomes likelier with each token past a length.

$$\text{logit}'(\text{EOS}) = \text{logit}(\text{EOS}) + \lvert \text{logit}(\text{EOS}) \rvert
\left(\text{factor}^{\,n - \text{after}} - 1\right)$$

if the number $n$ of new tokens is above `after`. It is transformers' ExponentialDecayLengthPenalty.
Its effect depends on the absolute value of the logit, so adding a constant to all logits, which
leaves softmax unchanged, changes it.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

import gptk

LARGEST = 1e30
"""The largest growth: finite in float32, because 0 · inf would be NaN."""


class LengthDecay(gptk.LogitsProcessor):
    """Raises the logit of EOS exponentially once the text has a given length."""

    name = "length-decay"
    example = "after=30,factor=1.05"
    positional = "after"

    after: int = Field(ge=0, description="new tokens before the effect begins")
    factor: float = Field(
        gt=0, description="growth with each token after that; 1 changes nothing, below 1 prolongs"
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        growths = [
            self._growth(length - prompt_length - self.after)
            for length, prompt_length in zip(rows.lengths, rows.prompt_lengths, strict=True)
        ]
        eos = [token for token in rows.eos if token < logits.shape[-1]]
        if not eos or not any(growths):
            return logits
        growth = torch.tensor(growths, device=logits.device, dtype=logits.dtype)[:, None]
        ends = logits[:, eos]
        raised = torch.where(ends.isfinite(), ends + ends.abs() * growth, ends)
        return logits.index_copy(1, torch.tensor(eos, device=logits.device), raised)

    def _growth(self, steps: int) -> float:
        """factor^steps - 1, or 0 before the effect begins."""
        if steps <= 0:
            return 0.0
        return math.expm1(min(steps * math.log(self.factor), math.log(LARGEST)))
