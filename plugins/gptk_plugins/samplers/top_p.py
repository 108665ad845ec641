r"""Top-p or nucleus sampling (Holtzman et al. 2020): draws from the most likely tokens that reach
p.

$$v \sim \operatorname{softmax}(\text{logits} / T)$$

over the smallest set $S$ of likeliest tokens with $\sum_{v \in S} p(v) \ge p$.
"""

from collections.abc import Sequence

from pydantic import Field

import gptk
from gptk_plugins.processors.top_p import TopP
from gptk_plugins.samplers.multinomial import Multinomial


class TopPSampler(Multinomial):
    """A token drawn from the nucleus: the processor top-p before multinomial."""

    name = "top-p"
    example = "p=0.9,temperature=0.8"
    positional = "p"

    p: float = Field(0.9, gt=0, le=1, description="the probability that the nucleus reaches")

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return (*super().processors(), TopP(p=self.p))
