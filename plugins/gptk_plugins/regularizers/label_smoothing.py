"""Label smoothing (Szegedy et al. 2016): (1 - ε) · loss - ε · mean_v log p(v)."""

from pydantic import Field
from torch import Tensor

import gptk


class LabelSmoothing(gptk.Regularizer):
    """Cross entropy with targets that spread a share ε of their mass over all tokens."""

    name = "label-smoothing"
    positional = "strength"
    logits = "chunks"
    example = "strength=0.1"

    strength: float = Field(0.1, ge=0, le=1, description="ε, the share of the mass that is spread")

    def loss(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        if not self.strength:
            return loss
        uniform = logits.logsumexp(dim=-1) - logits.mean(dim=-1)
        return (1 - self.strength) * loss + self.strength * uniform.mean()
