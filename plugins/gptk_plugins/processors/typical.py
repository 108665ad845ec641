"""Locally typical sampling (Meister et al. 2022): tokens about as surprising as is to be expected.

With the entropy H = -Σ p(v)·log p(v), tokens in the order of |-log p(v) - H| stay until they reach
mass p. So the likeliest token is the first to go where it is much likelier than the rest.
"""

from pydantic import Field
from torch import Tensor

import gptk


class Typical(gptk.LogitsProcessor):
    """Keeps the tokens whose surprise is nearest to the entropy, until they reach p."""

    name = "typical"
    example = "p=0.9"

    p: float = Field(0.9, gt=0, le=1, description="the probability to reach; 1 keeps all")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        if self.p == 1:
            return logits
        # |-log p(v) - H| is the distance of v's logit from Σ p·logit.
        nearness = (logits - gptk.vocabulary.mean(logits)).abs_().neg_()
        least = gptk.vocabulary.last_key(nearness, logits, self.p)
        return gptk.vocabulary.keep_from(logits, least, nearness)
