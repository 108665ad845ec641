r"""Min-p (Nguyen et al. 2024): only tokens with a share of the highest probability stay.

$$v \text{ stays} \iff p(v) \ge p_{\min} \cdot \max_w p(w)$$

with $p_{\min}$ = p, the option.
"""

import math

from pydantic import Field
from torch import Tensor

import gptk


class MinP(gptk.LogitsProcessor):
    """Keeps tokens whose probability is at least a share of the likeliest one's."""

    name = "min-p"
    for_sampling = True
    example = "p=0.05"
    positional = "p"

    p: float = Field(0.05, gt=0, le=1, description="the share of the highest probability")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        # p(v) / max p = exp(logit - max logit): no softmax is needed.
        least = logits.amax(dim=-1, keepdim=True) + math.log(self.p)
        return gptk.vocabulary.keep_from(logits, least)
