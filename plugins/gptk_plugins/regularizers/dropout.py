"""Dropout (Srivastava et al. 2014): x ← x · m / (1 - p) in training, m is 0 with probability p."""

from pydantic import Field

import gptk


class Dropout(gptk.Regularizer):
    """Drops embeddings, attention weights and residual updates in training, as GPT-2 does."""

    name = "dropout"
    example = "p=0.1"
    positional = "p"

    p: float = Field(0.1, ge=0, lt=1, description="probability that a value is dropped")

    def setup(self, model: gptk.GPT) -> None:
        model.set_dropout(self.p)
