r"""Top-p or nucleus (Holtzman et al. 2020): the smallest set of likeliest tokens reaching mass p.

What stays is the smallest set $S$ with

$$\sum_{v \in S} p(v) \ge p$$

that contains every token likelier than one of its members.
"""

from pydantic import Field
from torch import Tensor

import gptk


class TopP(gptk.LogitsProcessor):
    """Keeps the fewest most likely tokens that reach p together, and ties with the last."""

    name = "top-p"
    for_sampling = True
    example = "p=0.9"
    positional = "p"

    p: float = Field(0.9, gt=0, le=1, description="the probability to reach; 1 keeps all")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        if self.p == 1:
            return logits
        least = gptk.vocabulary.last_key(logits, logits, self.p)
        return gptk.vocabulary.keep_from(logits, least)
