"""Quantized weights on CUDA by torchao: int8 by channel and int4 by groups of 32 inputs.

torchao is an optional dependency: `pip install 'gptk-decoding[torchao]'`. int4 takes PyTorch's own
tensor-core kernel ("tinygemm"), which torchao packs for, and needs compute capability 8.0; inputs
are padded to a multiple of 1024. int8 takes half of bfloat16's memory, and more time: torchao's
product converts the matrix to bfloat16 each time, unless TorchInductor compiles it. Read in version
0.18 (quantization/quant_api.py, and quantize_/workflows/int4 and int8).
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_installed() -> bool:
    """Whether torchao can be imported."""
    return importlib.util.find_spec("torchao") is not None


def why_not_int4(device: torch.device) -> str | None:
    """Why a CUDA device cannot multiply by int4 weights, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {capability[0]}.{capability[1]}, and int4 needs 8.0"


class TorchAO:
    """The weights of a linear layer as one of torchao's tensors; products are in bfloat16."""

    def __init__(self, weight: Tensor, precision: str) -> None:
        """weight: (outputs, inputs). precision: int8 or int4."""
        from torchao import quantization

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
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            quantization.quantize_(layer, config)  # asks what the current device can do
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
