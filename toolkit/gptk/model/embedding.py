"""The token embedding, whose matrix may be packed: only the rows looked up are unpacked."""

from torch import Tensor, nn

from gptk.model.packing import PackableModule
from gptk.model.panels import Panels
from gptk.model.quantization import KernelGroups


class Embedding(PackableModule, nn.Embedding):
    """nn.Embedding, with weights that may be those of a packed head tied to it."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape. Returns (…, width)."""
        if (packed := self.in_use) is None:
            return super().forward(ids)
        assert isinstance(packed, KernelGroups | Panels)
        return packed.rows(ids.flatten(), self.dtype).view(*ids.shape, self.embedding_dim)
