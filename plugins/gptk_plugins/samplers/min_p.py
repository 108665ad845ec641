r"""Min-p sampling (Nguyen et al. 2024): multinomial sampling after min-p.

$$v \sim \operatorname{softmax}(\text{logits} / T)$$

over the $v$ with $p(v) \ge p_{\min} \cdot \max_w p(w)$, where $p_{\min}$ is the option p.
"""

from collections.abc import Sequence

from pydantic import Field

import gptk
from gptk_plugins.processors.min_p import MinP
from gptk_plugins.samplers.multinomial import Multinomial


class MinPSampler(Multinomial):
    """A token drawn from those with a share of the top probability: min-p before multinomial."""

    name = "min-p"
    example = "p=0.05,temperature=1.5"
    positional = "p"

    p: float = Field(0.05, gt=0, le=1, description="the share of the highest probability")

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return (*super().processors(), MinP(p=self.p))
