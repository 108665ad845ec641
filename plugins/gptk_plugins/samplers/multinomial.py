"""Multinomial (ancestral) sampling: v ~ softmax(logits / T).

By inverse CDF: the token is the first whose cumulative probability, in the order of token ids,
exceeds u, the row's one uniform number for this step. So a row's text depends on its own
random stream alone, and a small change of the logits seldom changes the token.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.processors.temperature import Temperature


class Multinomial(gptk.Sampler):
    """A token drawn from the model's distribution."""

    name = "multinomial"
    example = "temperature=0.8"
    random = True

    temperature: float = Field(1.0, gt=0, description="below 1 sharpens, above 1 flattens")

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return () if self.temperature == 1 else (Temperature(temperature=self.temperature),)

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        return gptk.Choice.one_each(draw(logits, rows.uniform()), logits, rows)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token id for each row by inverse CDF. logits: (rows, vocab); uniform: (rows,)."""
    # Sums of 50,000 float32 probabilities lose the digits that a fair draw needs.
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp().to(uniform.dtype)
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    tokens = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    # u * total can round up to total; the last token with any mass is then meant. Where no
    # token is left the sums are not numbers, and any id in range will do: its score says so.
    last = torch.searchsorted(cdf, total).clamp(max=logits.shape[-1] - 1)
    return torch.minimum(tokens, last)[:, 0]
