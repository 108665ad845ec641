r"""Epsilon sampling (Hewitt et al. 2022): only tokens above a fixed probability, and the likeliest.

$$v \text{ stays} \iff p(v) \ge \varepsilon \ \text{ or }\ p(v) = \max_w p(w)$$
"""

from pydantic import Field
from torch import Tensor

import gptk


class Epsilon(gptk.LogitsProcessor):
    """Keeps tokens whose probability is at least epsilon, and always the most likely one."""

    name = "epsilon"
    for_sampling = True
    example = "epsilon=0.001"
    positional = "epsilon"
    other_names = {"epsilon_cutoff": "epsilon"}

    epsilon: float = Field(
        0.0003, gt=0, lt=1, description="the least probability; the paper has 0.0003 to 0.0009"
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        probabilities = logits.softmax(dim=-1)
        least = probabilities.amax(dim=-1, keepdim=True).clamp(max=self.epsilon)
        return gptk.vocabulary.keep_from(logits, least, probabilities)
