r"""Locally typical sampling (Meister et al. 2022): tokens of about the expected surprise.

In the order of

$$\lvert -\log p(v) - H \rvert, \qquad H = -\sum_v p(v) \log p(v)$$

tokens stay until they reach mass $p$. So where the likeliest token is much likelier than the rest,
it is the first to be masked.
"""

from pydantic import Field
from torch import Tensor

import gptk


class Typical(gptk.LogitsProcessor):
    """Keeps the tokens whose surprise is nearest to the entropy, until they reach p."""

    name = "typical"
    for_sampling = True
    example = "p=0.9"
    positional = "p"
    other_names = {"typical_p": "p"}

    p: float = Field(0.9, gt=0, le=1, description="the probability to reach; 1 keeps all")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        if self.p == 1:
            return logits
        # |-log p(v) - H| is the distance of v's logit from Σ p·logit.
        nearness = (logits - gptk.vocabulary.mean(logits)).abs_().neg_()
        least = gptk.vocabulary.last_key(nearness, logits, self.p)
        return gptk.vocabulary.keep_from(logits, least, nearness)
