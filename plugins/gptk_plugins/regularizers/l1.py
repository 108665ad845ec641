"""L1 or lasso (Tibshirani 1996): strength · Σ |w|."""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class L1(gptk.Regularizer):
    """Adds the sum of the weights' absolute values to the loss, which drives weights to zero.

    It includes matrices and embeddings, but no norms and biases; a tied weight counts once. It is a
    sum, not a mean, so a larger model needs less strength.
    """

    name = "l1"
    positional = "strength"
    logits = "none"
    example = "strength=1e-6"

    strength: float = Field(1e-6, ge=0, description="what a weight of 1 adds to the loss")

    def penalty(self, model: gptk.GPT, logits: Tensor, targets: Tensor) -> Tensor | float:
        if not self.strength:
            return 0.0
        norms = [torch.linalg.vector_norm(p, 1) for p in model.parameters() if p.dim() >= 2]
        # The norm of a sharded weight is a DTensor, partial until it is gathered.
        gathered = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
        return self.strength * torch.stack(gathered).sum()
