"""Gradient clipping by norm (Pascanu et al. 2013): g ← g · min(1, max_norm / ‖g‖)."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

import gptk


class GradClip(gptk.Regularizer):
    """Scales all gradients down together where their joint L2 norm is above a limit.

    Logs `grad_norm`, the norm before clipping.
    """

    name = "grad-clip"
    example = "max_norm=1.0"
    positional = "max_norm"

    max_norm: float = Field(1.0, ge=0, description="the limit; 0 clips nothing, as in nanoGPT")

    def before_step(self, model: gptk.GPT) -> Mapping[str, Tensor | float]:
        norm = gptk.gradient_norm(model.parameters())
        if self.max_norm and not norm + 1e-6 <= self.max_norm:  # otherwise it would multiply by 1
            nn.utils.clip_grads_with_norm_(model.parameters(), self.max_norm, norm)
        return {"grad_norm": norm}
