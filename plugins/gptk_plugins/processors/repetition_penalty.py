r"""Repetition penalty (CTRL, Keskar et al. 2019), for each token already in the row.

$$\text{logit}'(v) = \begin{cases}
\text{logit}(v) / \text{penalty} & \text{if } \text{logit}(v) > 0 \\
\text{logit}(v) \cdot \text{penalty} & \text{otherwise}
\end{cases}$$

The prompt is part of the row.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class RepetitionPenalty(gptk.LogitsProcessor):
    """Makes tokens that the row already has less likely."""

    name = "repetition-penalty"
    example = "penalty=1.1"
    positional = "penalty"
    other_names = {"repeat_penalty": "penalty"}

    penalty: float = Field(
        1.1, ge=1e-6, le=1e6, description="1 changes nothing; below 1 rewards repetition"
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        # Padding is replaced by the row's first token: penalizing that twice writes the same value.
        seen = torch.where(rows.mask, rows.tokens, rows.tokens[:, :1])
        old = logits.gather(1, seen)
        new = torch.where(old > 0, old / self.penalty, old * self.penalty)
        return logits.scatter(1, seen, new)
