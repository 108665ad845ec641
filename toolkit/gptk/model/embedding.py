"""The token embedding, whose matrix may be quantized: only the rows looked up are dequantized."""

from torch import Tensor, nn

from gptk.model.packing import PackableModule
from gptk.model.quantization import KernelGroups


class Embedding(PackableModule, nn.Embedding):
    """nn.Embedding, with weights that may be those of a quantized head tied to it."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape. Returns (…, width)."""
        if self.packed is None:
            return super().forward(ids)
        assert isinstance(self.packed, KernelGroups)
        return self.packed.rows(ids.flatten(), self.dtype).view(*ids.shape, self.embedding_dim)
