r"""Top-k (Fan et al. 2018): only the k largest logits stay.

$$v \text{ stays} \iff \text{logit}(v) \ge \text{the } k\text{-th largest logit}$$
"""

from pydantic import Field
from torch import Tensor

import gptk


class TopK(gptk.LogitsProcessor):
    """Keeps the k most likely tokens, and any that tie with the k-th."""

    name = "top-k"
    for_sampling = True
    example = "k=50"
    positional = "k"

    k: int = Field(50, ge=1, description="how many tokens to keep")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        if self.k >= logits.shape[-1]:
            return logits
        least = gptk.vocabulary.top(logits, self.k).values[:, -1:]
        return gptk.vocabulary.keep_from(logits, least)
