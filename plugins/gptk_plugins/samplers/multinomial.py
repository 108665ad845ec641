"""Multinomial (ancestral) sampling: v ~ softmax(logits / T).

    argminᵥ E(v) / p(v)

where each row, position and token has an exponential random number E of its own: a race in which
tokens win as often as they are likely (the Gumbel-max trick; Gumbel 1954, Maddison et al. 2014).
So a row's text depends on its own random stream alone; a small change of the logits, by another
batch or a draft model's, seldom changes the token; and a truncation changes it only if it cuts
it off.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.processors.temperature import Temperature


class Multinomial(gptk.Sampler):
    """A token drawn from the model's distribution."""

    name = "multinomial"
    example = "temperature=0.8"
    random = True

    temperature: float = Field(
        1.0, ge=1e-6, le=1e6, description="below 1 sharpens, above 1 flattens"
    )

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return () if self.temperature == 1 else (Temperature(temperature=self.temperature),)

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        tokens, logprobs = rows.draw(logits)
        return gptk.Choice(tokens=tokens, logprobs=logprobs, scores=rows.scores + logprobs)
