"""Quantized weights for PyTorch's kernels, on CPUs that cannot run gptk's.

They round activations and scales to bfloat16. For many rows weights are dequantized.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk.model.levels import GROUP, WEIGHTS_AT_A_TIME, Levels
from gptk.model.rounding import NearestLevels, outputs_at_a_time
from gptk.system.devices import has_fast_products

_MANY_ROWS = 64
"""From this many rows on, it is faster to dequantize the weights and multiply by them than to use
PyTorch's kernels."""
PYTORCH_BLOCK = 64
"""Outputs are padded to a multiple of this for PyTorch's int4 kernel."""


class PyTorchInt8:
    """w = code · scale, with a code from -127 to 127 and a scale for each output."""

    kind = "int8"

    def __init__(self, weight: Tensor) -> None:
        weight = weight.detach()
        self._codes = torch.empty(weight.shape, dtype=torch.int8)
        self._scale = torch.empty(len(weight), dtype=torch.bfloat16)
        for outputs, part in outputs_at_a_time(weight):
            # The scale is rounded to the kernel's bfloat16 before codes are computed from it.
            self._scale[outputs] = torch.linalg.vector_norm(part, float("inf"), dim=1) / 127
            scale = self._scale[outputs].float().clamp(min=torch.finfo(torch.float32).tiny)
            self._codes[outputs] = (part / scale[:, None]).round_().clamp_(-127, 127)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, bias, self)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._codes.to(dtype).mul_(self._scale[:, None])

    def transposed(self, dtype: torch.dtype) -> Tensor:
        return self.dense(dtype).T

    @property
    def device(self) -> torch.device:
        return self._codes.device

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def matmul_few_rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch._weight_int8pack_mm(x.bfloat16().contiguous(), self._codes, self._scale)
        return _with_bias(y, x, bias)


class PyTorchInt4:
    """w = (code - 8) · scale + zero, with a code from 0 to 15, and scale and zero by groups."""

    kind = "int4"

    def __init__(self, levels: Levels | NearestLevels) -> None:
        """levels: of 4 bits."""

        def part_of(outputs: slice) -> tuple[Tensor, Tensor, Tensor]:
            part = levels[outputs]
            return part.codes, part.scale, part.offset + 8 * part.scale

        self._pack(levels.shape, part_of)

    @classmethod
    def of_eight_bits(cls, levels: Levels | NearestLevels) -> "PyTorchInt4":
        """An 8-bit matrix as two 4-bit matrices side by side, of high and of low nibbles.

        So it has twice as many inputs. The offset is added by the high nibbles' matrix.
        """

        def part_of(outputs: slice) -> tuple[Tensor, Tensor, Tensor]:
            part = levels[outputs]
            codes, scale = part.codes, part.scale
            zero = part.offset + 128 * scale  # added to (high - 8) · 16 scale
            scale = scale.bfloat16().float()
            return (
                torch.cat((codes >> 4, codes & 15), dim=1),
                torch.cat((16 * scale, scale), dim=1),
                torch.cat((zero, 8 * scale), dim=1),
            )

        nibbles = cls.__new__(cls)
        nibbles._pack(torch.Size((levels.shape[0], 2 * levels.shape[1])), part_of)
        return nibbles

    def _pack(
        self, shape: torch.Size, part_of: Callable[[slice], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        """part_of: returns for a slice of outputs codes (…, inputs), scale and zero (…, groups)."""
        self._outputs, inputs = shape
        padded = self._outputs + -self._outputs % PYTORCH_BLOCK
        self._packed = torch.empty(padded, inputs // 2, dtype=torch.uint8)
        self._scales = torch.empty(inputs // GROUP, padded, 2, dtype=torch.bfloat16)
        """(groups, outputs, 2): scale and zero."""
        step = max(PYTORCH_BLOCK, WEIGHTS_AT_A_TIME // inputs // PYTORCH_BLOCK * PYTORCH_BLOCK)
        for start in range(0, padded, step):
            codes, scale, zero = part_of(slice(start, start + step))
            missing = -len(codes) % PYTORCH_BLOCK
            if missing:
                codes, scale, zero = (F.pad(x, (0, 0, 0, missing)) for x in (codes, scale, zero))
            part = slice(start, start + len(codes))
            self._packed[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            self._scales[:, part] = torch.stack((scale.T, zero.T), dim=2)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, bias, self)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.transposed(dtype).T

    def transposed(self, dtype: torch.dtype) -> Tensor:
        layout = _int4_layout()
        groups, padded, _ = self._scales.shape
        if layout is None:  # multiply by the identity matrix
            eye = torch.eye(groups * GROUP, dtype=torch.bfloat16)
            return self.matmul_few_rows(eye, None).to(dtype)
        block, dim = layout
        nibbles = self._packed.view(padded // block, groups, GROUP, block // 2).permute(1, 2, 0, 3)
        codes = torch.stack((nibbles & 15, nibbles >> 4), dim).view(groups, GROUP, padded)
        scale, zero = self._scales[:, None].float().unbind(-1)
        dense = codes.float()
        torch.addcmul(zero - 8 * scale, dense, scale, out=dense)
        return dense.flatten(0, 1)[:, : self._outputs].to(dtype)

    @property
    def nbytes(self) -> int:
        return int(self._packed.nbytes + self._scales.nbytes)

    @property
    def device(self) -> torch.device:
        return self._packed.device

    def matmul_few_rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), self._packed, GROUP, self._scales
        )
        return _with_bias(y[:, : self._outputs], x, bias)


class PyTorchInt8Groups:
    """w = code · scale + offset, with a code from 0 to 255, and scale and offset by groups.

    PyTorch has no kernel for that. But an 8-bit matrix is two 4-bit matrices side by side, of high
    and low nibbles: code = 16 · high + low, so w = (high · 16 scale + offset) + low · scale. The
    inputs x are given to them twice.
    """

    kind = "int8"

    def __init__(self, levels: Levels | NearestLevels) -> None:
        self._nibbles = PyTorchInt4.of_eight_bits(levels)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, bias, self)

    def matmul_few_rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._nibbles.matmul_few_rows(torch.cat((x, x), dim=-1), bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.transposed(dtype).T

    def transposed(self, dtype: torch.dtype) -> Tensor:
        high, low = self._nibbles.transposed(torch.float32).chunk(2, dim=0)
        return (high + low).to(dtype)

    @property
    def nbytes(self) -> int:
        return self._nibbles.nbytes

    @property
    def device(self) -> torch.device:
        return self._nibbles.device


def _linear(
    x: Tensor, bias: Tensor | None, weights: PyTorchInt8 | PyTorchInt4 | PyTorchInt8Groups
) -> Tensor:
    """x times the weights, plus the bias: few rows by the kernel, many with dequantized weights."""
    if x.dim() != 2:
        y = _linear(x.flatten(0, -2), bias, weights)
        return y.view(*x.shape[:-1], y.shape[1])
    if x.shape[0] < _MANY_ROWS or _int4_layout() is None:
        return weights.matmul_few_rows(x, bias)
    dtype = torch.bfloat16 if has_fast_products(torch.bfloat16) else torch.float32
    return _with_bias(x.to(dtype) @ weights.transposed(dtype), x, bias)


def _with_bias(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """y in x's dtype, plus the bias."""
    y = y.to(x.dtype)
    return y if bias is None else y + bias


@functools.cache
def _int4_layout() -> tuple[int, Literal[3, 4]] | None:
    """How many outputs PyTorch's int4 layout packs together, and how; None for an unknown layout.

    A byte has the codes of two outputs for one input. The outputs of a block are in the order of
    `stack((low nibbles, high nibbles), dim)`, of tensors (inputs, groups, blocks, half a block):
    for dim 3 the first half of a block is in low nibbles, for 4 every other output. The layout is
    undocumented and differs between processors, so it is found out by packing known codes.
    """
    for block in (64, 32):
        outputs = torch.arange(block, dtype=torch.int32)[:, None].expand(block, GROUP)
        low, high = torch.zeros(2, GROUP, 1, 1, block // 2, dtype=torch.int32)
        for shift in (0, 4):
            codes = ((outputs >> shift) & 15).contiguous()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            packed = packed.view(low.shape).int()
            low += (packed & 15) << shift
            high += (packed >> 4) << shift
        dims: tuple[Literal[3, 4], ...] = (3, 4)
        for dim in dims:
            if torch.equal(torch.stack((low, high), dim).view(GROUP, block), outputs.T):
                return block, dim
    return None
