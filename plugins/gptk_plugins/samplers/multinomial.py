r"""Multinomial (ancestral) sampling: each token is drawn from the model's distribution.

$$v \sim p = \operatorname{softmax}(\text{logits} / T)$$

The token is

$$\operatorname*{argmin}_v\ \frac{E(v)}{p(v)}$$

where $E(v) \sim \operatorname{Exp}(1)$ is drawn independently for each row, position and token: a
race that each token wins with its probability (the Gumbel-max trick; Gumbel 1954, Maddison et al.
2014). So a row's text depends on its own random stream alone; a small change of the logits, as by
another batch size or by a draft model, seldom changes the token; and a truncation changes it only
if it removes it.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins._temperature import TemperatureOption
from gptk_plugins.processors.temperature import Temperature


class Multinomial(gptk.Sampler):
    """A token drawn from the model's distribution."""

    name = "multinomial"
    example = "temperature=0.8"
    positional = "temperature"
    other_names = {"do_sample": ""}
    random = True

    temperature: TemperatureOption = Field(
        1.0, ge=1e-6, le=1e6, description="below 1 sharpens, above 1 flattens"
    )

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return () if self.temperature == 1 else (Temperature(temperature=self.temperature),)

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        tokens, logprobs = rows.draw(logits)
        return gptk.Choice(tokens=tokens, logprobs=logprobs, scores=rows.scores + logprobs)
