"""Decoupled weight decay (AdamW, Loshchilov & Hutter 2019): θ ← θ - lr · strength · θ."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

import gptk


class WeightDecay(gptk.Regularizer):
    """Shrinks weights towards zero at each step, independent of the gradient.

    Weight matrices always decay; by default embeddings do too, and norms and biases do not, as
    in nanoGPT. A head that is tied to the embedding is an embedding.
    """

    name = "weight-decay"
    example = "strength=0.1"
    positional = "strength"

    strength: float = Field(0.1, ge=0, description="a step removes lr · strength of a weight")
    norms: bool = Field(False, description="whether the gains of norms decay")
    biases: bool = Field(False, description="whether biases decay, including those of norms")
    embeddings: bool = Field(True, description="whether embeddings decay, positions included")

    def parameter_options(
        self, module: nn.Module, name: str, parameter: Tensor
    ) -> Mapping[str, float]:
        return {"weight_decay": self.strength if self._decays(module, name) else 0.0}

    def _decays(self, module: nn.Module, name: str) -> bool:
        # Embeddings by name, because a tied head, a linear layer, has the same weight.
        if name.startswith("embed"):
            return self.embeddings
        if name.endswith("bias"):
            return self.biases
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return self.norms
        return True
