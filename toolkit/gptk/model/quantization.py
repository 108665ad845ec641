"""Quantized weights: int8 by channel and int4 by groups of 32 inputs, on CPUs.

Decoding reads every weight once a step, so a weight of a quarter of the bytes takes about a quarter
of the time. Weights are packed for gptk's own kernel (`KernelGroups`, see gptk.kernels) or, on
machines that cannot run it, for PyTorch's kernels (`PyTorchInt8`, `PyTorchInt4`,
`PyTorchInt8Groups`), which round activations, scales and offsets to bfloat16. All are made for few
rows. For many, as in a prompt, the weights are dequantized, to bfloat16 or float32, for a single
product. On CUDA torchao quantizes, see gptk.model.torchao.
"""

import functools
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.distribution import install_command
from gptk.errors import DeviceError
from gptk.model.levels import (
    GROUP,
    WEIGHTS_AT_A_TIME,
    Levels,
    NearestLevels,
    Precision,
    outputs_at_a_time,
)
from gptk.system.memory import new_bytes

_MANY_ROWS = 64
"""From this many rows on, dequantizing the weights and multiplying by them is faster."""
_PYTORCH_BLOCK = 64
"""Outputs are padded to a multiple of this for PyTorch's int4 kernel."""
_KERNEL_BLOCK = 16
"""Outputs are padded to a multiple of this for gptk's kernel."""


class Packed(Protocol):
    """The weights of a linear layer, (outputs, inputs), in the layout of a kernel."""

    kind: str
    """The precision: int8, int4 or bfloat16."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weights, plus the bias, in x's dtype. x: (…, inputs)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The dequantized weights, (outputs, inputs) bfloat16."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """The bytes that the weights take in memory."""
        raise NotImplementedError


def check_device(precision: Precision | Literal["stored"], device: torch.device) -> None:
    """Raises DeviceError if weights of a precision cannot be on a device."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise DeviceError(f"quantized weights need the device cpu or cuda, not {device.type}")
    if precision == "stored":
        raise DeviceError("quantize stored needs the device cpu; on cuda it can be int8 or int4")
    from gptk.model.torchao import is_installed

    if not is_installed():
        raise DeviceError(
            f"quantize {precision} on cuda needs torchao; install it: {install_command('torchao')}"
        )


def quantized(weight: Tensor, precision: Precision) -> Packed | None:
    """The weights, each rounded to the nearest level, on a CPU or, by torchao, on CUDA.

    weight: (outputs, inputs). Returns None for other devices, and if inputs is no multiple of 32.
    """
    if weight.device.type not in ("cpu", "cuda") or weight.shape[1] % GROUP:
        return None
    if weight.device.type == "cuda":
        from gptk.model.torchao import TorchAO

        return TorchAO(weight.bfloat16(), precision)
    if precision == "int8" and not kernels.available():
        return PyTorchInt8(weight)
    return pack(NearestLevels(weight.detach(), 4 if precision == "int4" else 8))


def bytes_of(shape: torch.Size, kind: str, *, by_groups: bool = False) -> int:
    """The bytes that a matrix of that shape takes in memory, on a CPU.

    kind: float32, bfloat16, int8 or int4. by_groups: int8 has scales and offsets by groups, as in
    files, and not by channel.
    """
    count = shape.numel()
    if not kind.startswith("int"):
        return count * (4 if kind == "float32" else 2)
    outputs, inputs = shape
    if kernels.available():
        padded = outputs + -outputs % _KERNEL_BLOCK
        return padded * (inputs * int(kind[3:]) // 8 + 4 * (inputs // GROUP))
    if kind == "int8" and not by_groups:
        return count + 2 * outputs
    halves = 2 if kind == "int8" else 1
    padded = outputs + -outputs % _PYTORCH_BLOCK
    return halves * padded * (inputs // 2 + 4 * (inputs // GROUP))


def pack(levels: Levels | NearestLevels) -> Packed:
    """The weights of a linear layer, for the fastest kernel there is.

    Codes stay the same. gptk's kernel has scales and offsets in float16, as GGUF files do;
    PyTorch's in bfloat16.
    """
    if kernels.available():
        return KernelGroups(levels)
    return PyTorchInt4(levels) if levels.bits == 4 else PyTorchInt8Groups(levels)


class KernelGroups:
    """w = code · scale + offset by groups of 32 inputs, with 4 or 8 bits, for gptk's kernel.

    The weights are in blocks of 16 outputs. A block has for each group 16 scales, 16 offsets, and
    the codes: those of four inputs for all 16 outputs, then those of the next four inputs, and so
    on. With 4 bits, low nibbles are the first 16 inputs of the group, high nibbles the others.
    """

    def __init__(self, levels: Levels | NearestLevels) -> None:
        self.kind = "int8" if levels.bits == 8 else "int4"
        self._bits: int = levels.bits
        self._outputs, self._inputs = levels.shape
        groups = self._inputs // GROUP
        blocks = -(-self._outputs // _KERNEL_BLOCK)
        self._weights = new_bytes(blocks, groups, (4 + GROUP * self._bits // 8) * _KERNEL_BLOCK)
        step = max(1, WEIGHTS_AT_A_TIME // (_KERNEL_BLOCK * self._inputs))
        for block in range(0, blocks, step):
            part = levels[block * _KERNEL_BLOCK : (block + step) * _KERNEL_BLOCK]
            kernels.pack(part.codes, part.scale, part.offset, self._bits, self._weights[block:])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, bias, self, self._outputs)

    def dense(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return kernels.dequantize_packed(
            self._weights, self._bits, self._outputs, self._inputs, dtype
        )

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes

    def matmul_few_rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float16:
            return self.matmul_few_rows(x.float(), bias).half()
        return kernels.quantized_linear(x, self._weights, bias, self._bits, self._outputs)


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
        return _linear(x, bias, self, len(self._scale))

    def dense(self) -> Tensor:
        return self._codes.bfloat16().mul_(self._scale[:, None])

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
        padded = self._outputs + -self._outputs % _PYTORCH_BLOCK
        self._packed = torch.empty(padded, inputs // 2, dtype=torch.uint8)
        self._scales = torch.empty(inputs // GROUP, padded, 2, dtype=torch.bfloat16)
        """(groups, outputs, 2): scale and zero."""
        step = max(_PYTORCH_BLOCK, WEIGHTS_AT_A_TIME // inputs // _PYTORCH_BLOCK * _PYTORCH_BLOCK)
        for start in range(0, padded, step):
            codes, scale, zero = part_of(slice(start, start + step))
            missing = -len(codes) % _PYTORCH_BLOCK
            if missing:
                codes, scale, zero = (F.pad(x, (0, 0, 0, missing)) for x in (codes, scale, zero))
            part = slice(start, start + len(codes))
            self._packed[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            self._scales[:, part] = torch.stack((scale.T, zero.T), dim=2)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, bias, self, self._outputs)

    def dense(self) -> Tensor:
        block = _int4_block()
        groups, padded, _ = self._scales.shape
        if block is None:  # an unknown layout: multiply by the identity matrix
            eye = torch.eye(groups * GROUP, dtype=torch.bfloat16)
            return self.matmul_few_rows(eye, None).T
        # (blocks, groups, inputs of a group, half a block): low nibbles are the block's first half
        nibbles = self._packed.view(padded // block, groups, GROUP, block // 2)
        scales = self._scales.view(groups, padded // block, 1, block, 2).transpose(0, 1).float()
        scale, zero = scales.unbind(-1)
        halves = (nibbles & 15).float(), (nibbles >> 4).float()
        dense = [
            torch.addcmul(half_zero - 8 * half_scale, half, half_scale).bfloat16()
            for half, half_scale, half_zero in zip(
                halves, scale.chunk(2, dim=-1), zero.chunk(2, dim=-1), strict=True
            )
        ]
        by_input = torch.cat(dense, dim=-1).view(padded // block, groups * GROUP, block)
        by_input = by_input.transpose(0, 1).reshape(groups * GROUP, padded)
        return by_input[:, : self._outputs].T

    @property
    def nbytes(self) -> int:
        return int(self._packed.nbytes + self._scales.nbytes)

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
        return self._nibbles.linear(torch.cat((x, x), dim=-1), bias)

    def dense(self) -> Tensor:
        high, low = self._nibbles.dense().float().chunk(2, dim=1)
        return (high + low).bfloat16()

    @property
    def nbytes(self) -> int:
        return self._nibbles.nbytes


def _linear(
    x: Tensor, bias: Tensor | None, weights: KernelGroups | PyTorchInt8 | PyTorchInt4, outputs: int
) -> Tensor:
    """x times the weights, plus the bias: few rows by the kernel, many with dequantized weights."""
    if x.dim() != 2:
        y = _linear(x.flatten(0, -2), bias, weights, outputs)
        return y.view(*x.shape[:-1], outputs)
    if x.shape[0] < _MANY_ROWS or (isinstance(weights, PyTorchInt4) and _int4_block() is None):
        return weights.matmul_few_rows(x, bias)
    if isinstance(weights, KernelGroups):
        dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
        return _with_bias(F.linear(x.to(dtype), weights.dense(dtype)), x, bias)
    return _with_bias(F.linear(x.bfloat16(), weights.dense()), x, bias)


def _with_bias(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """y in x's dtype, plus the bias."""
    y = y.to(x.dtype)
    return y if bias is None else y + bias


@functools.cache
def _int4_block() -> int | None:
    """How many outputs PyTorch's int4 layout packs together: 64, 32, or None for another layout.

    The layout is undocumented and differs between processors, so it is found out by packing known
    codes. A byte has an output of the first half of a block in its low nibble, and the output at
    the same place of the second half in its high nibble.
    """
    for block in (64, 32):
        outputs = torch.arange(block, dtype=torch.int32)[:, None].expand(block, GROUP)
        halves = torch.zeros(2, GROUP, block // 2, dtype=torch.int32)
        for shift in (0, 4):
            codes = ((outputs >> shift) & 15).contiguous()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            packed = packed.view(GROUP, block // 2).int()
            halves += torch.stack((packed & 15, packed >> 4)) << shift
        if torch.equal(torch.cat((halves[0], halves[1]), dim=1), outputs.T):
            return int(block)
    return None
