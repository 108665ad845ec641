"""Quantized weights on CUDA by torchao: int8 by channel and int4 by groups of 32 inputs.

torchao is an optional dependency: `pip install 'gptk-decoding[torchao]'`. int4 takes PyTorch's own
tensor-core kernel ("tinygemm"), which torchao packs for, and needs compute capability 8.0.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_installed() -> bool:
    """Whether torchao can be imported."""
    return importlib.util.find_spec("torchao") is not None


class TorchAO:
    """The weights of a linear layer as one of torchao's tensors; products are in bfloat16."""

    def __init__(self, weight: Tensor, precision: str) -> None:
        """weight: (outputs, inputs). precision: int8 or int4."""
        from torchao import quantization  # type: ignore[import-not-found, unused-ignore]

        self.kind = precision
        self._inputs = weight.shape[1]
        if precision == "int8":
            config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        else:
            config = quantization.Int4WeightOnlyConfig(
                group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        layer = nn.Linear(self._inputs, len(weight), bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        quantization.quantize_(layer, config)
        self._weight = layer.weight.detach()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x.bfloat16(), self._weight, None if bias is None else bias.bfloat16())
        return y.to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        eye = torch.eye(self._inputs, dtype=torch.bfloat16, device=self._weight.device)
        return self.linear(eye, None).T.to(dtype)

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def nbytes(self) -> int:
        names, _ = self._weight.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(getattr(self._weight, name).nbytes for name in names)
