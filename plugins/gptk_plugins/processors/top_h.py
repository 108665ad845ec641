r"""Top-H (Baradaran Potraj et al. 2025): likely tokens up to a share of the entropy.

Of the 100 likeliest tokens, with probabilities $p$ renormalized to sum to 1, the likeliest stay
while

$$-\sum_{\text{stay}} p(v) \log p(v) \le h \cdot H$$

where $H$ is the same sum over all 100. The paper calls $h$ alpha; the limit of 100 is that of its
authors' code and of transformers.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk

CANDIDATES = 100


class TopH(gptk.LogitsProcessor):
    """Keeps the most likely tokens up to a share of the entropy, and ties with the last."""

    name = "top-h"
    for_sampling = True
    example = "h=0.4"
    positional = "h"

    h: float = Field(0.4, gt=0, le=1, description="the share of the entropy; 1 keeps 100 tokens")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        top = gptk.vocabulary.top(logits, min(CANDIDATES, logits.shape[-1])).values
        probabilities = top.softmax(dim=-1)
        entropy = torch.special.entr(probabilities).cumsum(dim=-1)
        # A token of probability 0 adds nothing to the entropy and would always stay.
        kept = (entropy <= self.h * entropy[:, -1:]) & (probabilities > 0)
        last = kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1
        return gptk.vocabulary.keep_from(logits, top.gather(-1, last))
