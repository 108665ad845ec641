r"""Top-k sampling (Fan et al. 2018): multinomial sampling from the k most likely tokens.

$$v \sim \operatorname{softmax}(\text{logits} / T)$$

over the $k$ largest logits.
"""

from collections.abc import Sequence

from pydantic import Field

import gptk
from gptk_plugins.processors.top_k import TopK
from gptk_plugins.samplers.multinomial import Multinomial


class TopKSampler(Multinomial):
    """A token drawn from the k most likely ones: the processor top-k before multinomial."""

    name = "top-k"
    example = "k=50,temperature=0.8"
    positional = "k"

    k: int = Field(50, ge=1, description="how many tokens are left to draw from")

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return (*super().processors(), TopK(k=self.k))
