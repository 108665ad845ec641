r"""Temperature: below 1 sharpens the distribution, above 1 flattens it.

$$\text{logit}'(v) = \text{logit}(v) / T$$

so that $p'(v) \propto p(v)^{1/T}$.
"""

from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins._temperature import TemperatureOption


class Temperature(gptk.LogitsProcessor):
    """Sharpens (below 1) or flattens (above 1) the distribution."""

    name = "temperature"
    for_sampling = True
    example = "temperature=0.7"
    positional = "temperature"
    other_names = {"temp": "temperature"}

    temperature: TemperatureOption = Field(
        1.0, ge=1e-6, le=1e6, description="1 changes nothing; for 0 use greedy"
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        return logits / self.temperature
