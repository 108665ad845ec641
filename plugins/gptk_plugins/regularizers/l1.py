"""L1 or lasso (Tibshirani 1996): strength · Σ |w|."""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class L1(gptk.Regularizer):
    """Adds the sum of all weights' sizes to the loss, which drives weights to zero.

    Over matrices, embeddings among them: norms and biases do not count, and a tied weight counts
    once. It is a sum, not a mean, so a larger model needs less strength.
    """

    name = "l1"
    logits = "none"
    example = "strength=1e-6"

    strength: float = Field(1e-6, ge=0, description="what a weight of size 1 adds to the loss")

    def penalty(self, model: gptk.GPT, logits: Tensor, targets: Tensor) -> Tensor | float:
        if not self.strength:
            return 0.0
        sizes = [torch.linalg.vector_norm(p, 1) for p in model.parameters() if p.dim() >= 2]
        # A sharded weight's sum is in parts until it is gathered.
        whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in sizes]
        return self.strength * torch.stack(whole).sum()
