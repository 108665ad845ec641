"""Quantized weights: int8 by channel and int4 by groups of 32 inputs, on CPUs.

Decoding reads every weight once a step, so a quarter of the bytes takes about a quarter of the
time. Weights are packed for gptk's kernel (`KernelGroups`) or, where it cannot run, for PyTorch's
(`PyTorchInt8`, `PyTorchInt4`, `PyTorchInt8Groups`), which round activations and scales to bfloat16.
PyTorch's dequantize them for many rows. On CUDA torchao quantizes, see gptk.model.torchao.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.distribution import install_command
from gptk.errors import DeviceError, OptionError
from gptk.model.levels import (
    GROUP,
    WEIGHTS_AT_A_TIME,
    Levels,
    NearestLevels,
    Precision,
    StoredLevels,
    outputs_at_a_time,
)
from gptk.model.packing import Packed
from gptk.system.devices import has_fast_products
from gptk.system.memory import new_bytes

Quantize = Literal["auto", "none", "int8", "int4"]
"""What becomes of the matrices of linear layers. auto: those that a file has quantized, as Levels,
stay so where `keeps_levels`; none: all are dense; int8, int4: all are rounded, see Precision."""

_MANY_ROWS = 64
"""From this many rows on, it is faster to dequantize the weights and multiply by them than to use
PyTorch's kernels."""
_ROWS_AT_A_TIME = 256
"""Rows that are looked up at a time, so that the blocks that they are in take little memory."""
_PYTORCH_BLOCK = 64
"""Outputs are padded to a multiple of this for PyTorch's int4 kernel."""
_KERNEL_BLOCK = 16
"""Outputs are padded to a multiple of this for gptk's kernel."""


def check_quantize(quantize: str, device: torch.device) -> None:
    """Raises OptionError for what is no Quantize, DeviceError if a device does not have it."""
    if quantize not in get_args(Quantize):
        raise OptionError(f"quantize is {quantize!r}; it must be auto, none, int8 or int4")
    if device.type == "cpu" or quantize in ("auto", "none"):
        return
    if device.type != "cuda":
        raise DeviceError(f"quantize {quantize} needs the device cpu or cuda, not {device.type}")
    from gptk.model.torchao import is_installed

    if not is_installed():
        raise DeviceError(
            f"quantize {quantize} on cuda needs torchao; install it: {install_command('torchao')}"
        )


def keeps_levels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the matrices that a file has quantized stay so, with activations of a dtype.

    They do on a CPU where gptk's kernels run, which compute what the dequantized matrices give.
    PyTorch's kernels round activations to bfloat16, so they are used if activations are bfloat16,
    and the processor has instructions that they are written for.
    """
    if device.type != "cpu":
        return False
    by_pytorch = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
    return kernels.available() or (dtype == torch.bfloat16 and by_pytorch)


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
        self.bits: int = levels.bits
        self._outputs, self._inputs = levels.shape
        groups = self._inputs // GROUP
        blocks = -(-self._outputs // _KERNEL_BLOCK)
        self.weights = new_bytes(blocks, groups, (4 + GROUP * self.bits // 8) * _KERNEL_BLOCK)
        if isinstance(levels, StoredLevels):
            levels.pack_into(self.weights)
            return
        step = max(1, WEIGHTS_AT_A_TIME // (_KERNEL_BLOCK * self._inputs))
        for block in range(0, blocks, step):
            part = levels[block * _KERNEL_BLOCK : (block + step) * _KERNEL_BLOCK]
            kernels.pack(part.codes, part.scale, part.offset, self.bits, self.weights[block:])

    @classmethod
    def of_packed(cls, weights: Tensor, bits: int, outputs: int, inputs: int) -> "KernelGroups":
        """Weights that have been packed before. weights: (bytes,) uint8, which are not copied."""
        packed = cls.__new__(cls)
        packed.kind = "int8" if bits == 8 else "int4"
        packed.bits, packed._outputs, packed._inputs = bits, outputs, inputs
        packed.weights = weights.view(-(-outputs // _KERNEL_BLOCK), inputs // GROUP, -1)
        return packed

    def packs(self, levels: Levels) -> bool:
        """Whether this can be the packed matrix: the sizes, and the first and the last outputs."""
        outputs, inputs = levels.shape
        if (self.bits, self._outputs, self._inputs) != (levels.bits, outputs, inputs):
            return False
        last = (len(self.weights) - 1) * _KERNEL_BLOCK
        return not self.nbytes or all(
            torch.equal(self.weights[block : block + 1], KernelGroups(part).weights)
            for block, part in ((0, levels[:_KERNEL_BLOCK]), (last // _KERNEL_BLOCK, levels[last:]))
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self._outputs, self._inputs

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() != 2:
            return self.linear(x.flatten(0, -2), bias).view(*x.shape[:-1], self._outputs)
        dtype = x.dtype
        if dtype == torch.float16:
            return self.linear(x.float(), bias).half()
        if dtype not in (torch.float32, torch.bfloat16):
            return F.linear(x, self.dense(dtype), bias)
        return kernels.quantized_linear(x, self.weights, bias, self.bits, self._outputs)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if dtype not in (torch.float32, torch.bfloat16):
            return self.dense(torch.float32).to(dtype)
        return kernels.dequantize_packed(
            self.weights, self.bits, self._outputs, self._inputs, dtype
        )

    def rows(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized weights of the outputs with these numbers, (n,): (n, inputs).

        Raises IndexError for numbers of no output.
        """
        one = None
        if not torch.compiler.is_compiling() and (count := len(outputs)):
            one = outputs.tolist()[0] if count == 1 else None
            low, high = outputs.aminmax() if one is None else (one, one)
            if not 0 <= low <= high < self._outputs:
                raise IndexError(f"rows from {low} to {high} of {self._outputs}")
        if one is not None:  # as at each step of decoding
            return kernels.dequantize_row(self.weights, self.bits, self._inputs, one).to(dtype)
        sizes = self.bits, self._inputs
        parts = [
            kernels.dequantize_rows(self.weights, *sizes, part).to(dtype)
            for part in torch.split(outputs, _ROWS_AT_A_TIME)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @property
    def device(self) -> torch.device:
        return self.weights.device


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
