"""XTC, "exclude top choices" (Weidmann 2024): not the obvious token, but one good enough.

With a probability, drawn for each row and step: of the tokens with p(v) ≥ threshold only the least
likely stays, and all tokens below the threshold. As in llama.cpp, and unlike
text-generation-webui, end of text and line breaks are tokens as any other.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class XTC(gptk.LogitsProcessor):
    """Takes out the most likely tokens where a less likely one is still good enough."""

    name = "xtc"
    example = "probability=0.5,threshold=0.1"

    probability: float = Field(0.5, ge=0, le=1, description="how often it is done")
    threshold: float = Field(
        0.1, gt=0, le=1, description="what is good enough; above 0.5 nothing is taken out"
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        chosen = rows.uniform(draw=1) < self.probability
        if not bool(chosen.any()):
            return logits
        enough = logits.softmax(dim=-1) >= self.threshold
        # Infinite where no token is good enough, so that none is above it. Ties stay.
        least = torch.where(enough, logits, torch.inf).amin(dim=-1, keepdim=True)
        return logits.masked_fill((logits > least) & chosen[:, None], -torch.inf)
