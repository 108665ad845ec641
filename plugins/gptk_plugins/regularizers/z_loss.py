"""Z-loss (PaLM, Chowdhery et al. 2022): strength · mean (log Σ_v exp logit_v)²."""

from pydantic import Field
from torch import Tensor

import gptk


class ZLoss(gptk.Regularizer):
    """Keeps the softmax's normalizer near 1, so that logits do not drift."""

    name = "z-loss"
    positional = "strength"
    logits = "chunks"
    example = "strength=1e-4"

    strength: float = Field(1e-4, ge=0, description="weight of the penalty; PaLM's is 1e-4")

    def penalty(self, model: gptk.GPT, logits: Tensor, targets: Tensor) -> Tensor | float:
        if not self.strength:
            return 0.0
        return self.strength * logits.logsumexp(dim=-1).square().mean()
