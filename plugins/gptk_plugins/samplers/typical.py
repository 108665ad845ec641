r"""Locally typical sampling (Meister et al. 2022): draws tokens of about the expected surprise.

$$v \sim \operatorname{softmax}(\text{logits} / T)$$

over the $v$ with the smallest $\lvert -\log p(v) - H \rvert$ that reach $p$ together. $H$ is the
entropy; see the processor `typical`.
"""

from collections.abc import Sequence

from pydantic import Field

import gptk
from gptk_plugins.processors.typical import Typical
from gptk_plugins.samplers.multinomial import Multinomial


class TypicalSampler(Multinomial):
    """A token drawn from the typical ones: the processor typical before multinomial."""

    name = "typical"
    example = "p=0.9,temperature=0.8"
    positional = "p"

    p: float = Field(0.9, gt=0, le=1, description="the probability that the typical tokens reach")

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return (*super().processors(), Typical(p=self.p))
