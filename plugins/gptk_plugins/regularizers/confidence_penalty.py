"""Confidence penalty (Pereyra et al. 2017): strength · mean (log V - H(p)).

The paper subtracts the entropy H(p). log V, the largest entropy over V tokens, is added here: the
gradient is the same, and the penalty is never below zero. It equals KL(p ‖ uniform).
"""

import math

from pydantic import Field
from torch import Tensor

import gptk


class ConfidencePenalty(gptk.Regularizer):
    """Penalizes predictions of low entropy."""

    name = "confidence-penalty"
    positional = "strength"
    logits = "chunks"
    example = "strength=0.1"

    strength: float = Field(0.1, ge=0, description="weight of the penalty; the paper's is 0.1")

    def penalty(self, model: gptk.GPT, logits: Tensor, targets: Tensor) -> Tensor | float:
        if not self.strength:
            return 0.0
        logprobs = logits.log_softmax(dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        # By rounding, a uniform distribution's entropy can be slightly above log V.
        return self.strength * (math.log(logits.shape[-1]) - entropy.mean()).clamp(min=0)
