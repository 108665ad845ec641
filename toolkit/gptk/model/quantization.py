"""Quantized weights: int8 by channel and int4 by groups, on CPUs.

Decoding reads every weight once a step, so a weight of a quarter of the bytes takes about a quarter
of the time. Weights go to gptk's own kernel, see gptk.kernels, or where it cannot run to PyTorch's,
which rounds activations, scales and offsets to bfloat16. The kernels are made for few rows; for
many, as in a prompt, the weights are expanded, in the activations' dtype, for the moment of one
product. On CUDA torchao quantizes, see gptk.torchao.
"""

import functools
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
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
"""From here on a product with expanded weights is faster, the expansion included."""
_BLOCK = 64
"""Outputs that PyTorch's kernel has its weights packed in; fewer are filled up."""
_OWN_BLOCK = 16
"""The same of gptk's own kernel."""


class Packed(Protocol):
    """The weights of a linear layer, (outputs, inputs), in a layout of their own."""

    kind: str
    """The precision, by name."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weights, plus the bias, in x's dtype. x: (…, inputs)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weights as they count, (outputs, inputs) bfloat16."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        raise NotImplementedError


def check_device(precision: Precision | Literal["stored"], device: torch.device) -> None:
    """Raises DeviceError if weights of that precision cannot be on a device."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise DeviceError(f"quantized weights need the device cpu or cuda, not {device.type}")
    if precision == "stored":
        raise DeviceError("quantize stored needs the device cpu; on cuda it can be int8 or int4")
    from gptk.model.torchao import is_installed

    if not is_installed():
        raise DeviceError(
            f"quantize {precision} on cuda needs torchao; install it: pip install 'gptk[torchao]'"
        )


def quantized(weight: Tensor, precision: Precision) -> Packed | None:
    """Quantized weights, each rounded to the nearest level; None where they do not suit.

    weight: (outputs, inputs) on a CPU, or on CUDA, where torchao does it. Inputs that no group of
    32 divides stay as they are.
    """
    if weight.device.type not in ("cpu", "cuda") or weight.shape[1] % GROUP:
        return None
    if weight.device.type == "cuda":
        from gptk.model.torchao import TorchAO

        return TorchAO(weight.bfloat16(), precision)
    if precision == "int8" and not kernels.available():
        return Int8(weight)
    return pack(NearestLevels(weight.detach(), 4 if precision == "int4" else 8))


def bytes_of(shape: torch.Size, kind: str, *, by_groups: bool = False) -> int:
    """What a weight of that shape takes in memory, on a CPU.

    kind: float32, bfloat16, int8 (by_groups as a file has it, else by channel) or int4.
    """
    count = shape.numel()
    if not kind.startswith("int"):
        return count * (4 if kind == "float32" else 2)
    outputs, inputs = shape
    if kernels.available():
        padded = outputs + -outputs % _OWN_BLOCK
        return padded * (inputs * int(kind[3:]) // 8 + 4 * (inputs // GROUP))
    if kind == "int8" and not by_groups:
        return count + 2 * outputs
    halves = 2 if kind == "int8" else 1
    padded = outputs + -outputs % _BLOCK
    return halves * padded * (inputs // 2 + 4 * (inputs // GROUP))


def pack(levels: Levels | NearestLevels) -> Packed:
    """The weights of a linear layer, by the fastest kernel there is.

    The codes are the same. gptk's own kernel has scales and offsets in float16, as files do;
    PyTorch's in bfloat16.
    """
    if kernels.available():
        return Groups(levels)
    return Int4(levels) if levels.bits == 4 else Int8Groups(levels)


class Groups:
    """w = code · scale + offset as Levels have it, for gptk's own kernel.

    In blocks of 16 outputs: for each group of inputs 16 scales, 16 offsets, and the codes, those
    of four inputs for all 16 outputs next to each other. Of 4 bits, the low halves of bytes are
    the first 16 inputs of the group, the high ones the others.
    """

    def __init__(self, levels: Levels | NearestLevels) -> None:
        self.kind = "int8" if levels.bits == 8 else "int4"
        self._bits: int = levels.bits
        self._outputs, self._inputs = levels.shape
        groups = self._inputs // GROUP
        blocks = -(-self._outputs // _OWN_BLOCK)
        self._weights = new_bytes(blocks, groups, (4 + GROUP * self._bits // 8) * _OWN_BLOCK)
        step = max(1, WEIGHTS_AT_A_TIME // (_OWN_BLOCK * self._inputs))
        for block in range(0, blocks, step):
            part = levels[block * _OWN_BLOCK : (block + step) * _OWN_BLOCK]
            kernels.pack(part.codes, part.scale, part.offset, self._bits, self._weights[block:])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, bias, self, self._outputs)

    def dense(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return kernels.expand(self._weights, self._bits, self._outputs, self._inputs, dtype)

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes

    def few(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float16:
            return self.few(x.float(), bias).half()
        return kernels.linear(x, self._weights, bias, self._bits, self._outputs)


class Int8:
    """w = code · scale, with a code from -127 to 127 and a scale for each output.

    For PyTorch's kernel, as all that follows.
    """

    kind = "int8"

    def __init__(self, weight: Tensor) -> None:
        weight = weight.detach()
        self._codes = torch.empty(weight.shape, dtype=torch.int8)
        self._scale = torch.empty(len(weight), dtype=torch.bfloat16)
        for part, some in outputs_at_a_time(weight):
            # The scale that the kernel gets is rounded first, so that codes fit it.
            self._scale[part] = torch.linalg.vector_norm(some, float("inf"), dim=1) / 127
            scale = self._scale[part].float().clamp(min=torch.finfo(torch.float32).tiny)
            self._codes[part] = (some / scale[:, None]).round_().clamp_(-127, 127)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, bias, self, len(self._scale))

    def dense(self) -> Tensor:
        return self._codes.bfloat16().mul_(self._scale[:, None])

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def few(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch._weight_int8pack_mm(x.bfloat16().contiguous(), self._codes, self._scale)
        return _finished(y, x, bias)


class Int4:
    """w = (code - 8) · scale + zero, with a code from 0 to 15, and a group's scale and zero."""

    kind = "int4"

    def __init__(self, levels: Levels | NearestLevels) -> None:
        """levels: of 4 bits."""

        def part_of(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            part = levels[rows]
            return part.codes, part.scale, part.offset + 8 * part.scale

        self._pack(levels.shape, part_of)

    @classmethod
    def of_eight_bits(cls, levels: Levels | NearestLevels) -> "Int4":
        """Those with 8 bits as twice as many inputs: a matrix for the high halves, one for the low.

        The value of code 0 goes with the high ones.
        """

        def part_of(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            part = levels[rows]
            codes, scale = part.codes, part.scale
            zero = part.offset + 128 * scale  # of (high - 8) · 16 scale
            scale = scale.bfloat16().float()
            return (
                torch.cat((codes >> 4, codes & 15), dim=1),
                torch.cat((16 * scale, scale), dim=1),
                torch.cat((zero, 8 * scale), dim=1),
            )

        made = cls.__new__(cls)
        made._pack(torch.Size((levels.shape[0], 2 * levels.shape[1])), part_of)
        return made

    def _pack(
        self, shape: torch.Size, part_of: Callable[[slice], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        """part_of gives for some outputs the codes (…, inputs), scale and zero (…, groups)."""
        self._outputs, inputs = shape
        padded = self._outputs + -self._outputs % _BLOCK
        self._packed = torch.empty(padded, inputs // 2, dtype=torch.uint8)
        self._scales = torch.empty(inputs // GROUP, padded, 2, dtype=torch.bfloat16)
        """(groups, outputs, 2), as the kernel has it."""
        step = max(_BLOCK, WEIGHTS_AT_A_TIME // inputs // _BLOCK * _BLOCK)
        for at in range(0, padded, step):
            codes, scale, zero = part_of(slice(at, at + step))
            room = -len(codes) % _BLOCK
            codes = F.pad(codes, (0, 0, 0, room)) if room else codes
            part = slice(at, at + len(codes))
            self._packed[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            for index, one in enumerate((scale, zero)):
                one = F.pad(one, (0, 0, 0, room)) if room else one
                self._scales[:, part, index] = one.T

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, bias, self, self._outputs)

    def dense(self) -> Tensor:
        block = _packed_in()
        groups, padded, _ = self._scales.shape
        if block is None:  # a layout that is not known: ask the kernel, an input at a time
            eye = torch.eye(groups * GROUP, dtype=torch.bfloat16)
            return self.few(eye, None).T
        # (blocks, groups, inputs of a group, half a block): the halves are a byte's nibbles
        nibbles = self._packed.view(padded // block, groups, GROUP, block // 2)
        scales = self._scales.view(groups, padded // block, 1, block, 2).transpose(0, 1).float()
        scale, zero = scales.unbind(-1)
        halves = (nibbles & 15).float(), (nibbles >> 4).float()
        dense = [
            torch.addcmul(zero_ - 8 * scale_, half, scale_).bfloat16()
            for half, scale_, zero_ in zip(
                halves, scale.chunk(2, dim=-1), zero.chunk(2, dim=-1), strict=True
            )
        ]
        by_input = torch.cat(dense, dim=-1).view(padded // block, groups * GROUP, block)
        by_input = by_input.transpose(0, 1).reshape(groups * GROUP, padded)
        return by_input[:, : self._outputs].T

    @property
    def nbytes(self) -> int:
        return int(self._packed.nbytes + self._scales.nbytes)

    def few(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), self._packed, GROUP, self._scales
        )
        return _finished(y[:, : self._outputs], x, bias)


class Int8Groups:
    """w = code · scale + offset, with a code from 0 to 255, and a group's scale and offset.

    PyTorch has no kernel for that. But a code is 16 · high + low, so that two int4 matrices add up
    to the very same: high · 16 scale + offset, and low · scale. They stand side by side in one,
    which takes x twice.
    """

    kind = "int8"

    def __init__(self, levels: Levels | NearestLevels) -> None:
        self._halves = Int4.of_eight_bits(levels)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._halves.linear(torch.cat((x, x), dim=-1), bias)

    def dense(self) -> Tensor:
        high, low = self._halves.dense().float().chunk(2, dim=1)
        return (high + low).bfloat16()

    @property
    def nbytes(self) -> int:
        return self._halves.nbytes


def _product(
    x: Tensor, bias: Tensor | None, weights: "Groups | Int8 | Int4", outputs: int
) -> Tensor:
    """x times weights by the kernel for few rows, or expanded ones for many."""
    if x.dim() != 2:
        y = _product(x.flatten(0, -2), bias, weights, outputs)
        return y.view(*x.shape[:-1], outputs)
    if x.shape[0] < _MANY_ROWS or (isinstance(weights, Int4) and _packed_in() is None):
        return weights.few(x, bias)
    if isinstance(weights, Groups):
        dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
        return _finished(F.linear(x.to(dtype), weights.dense(dtype)), x, bias)
    return _finished(F.linear(x.bfloat16(), weights.dense()), x, bias)


def _finished(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """A product as it is to be: with the bias, in x's dtype."""
    y = y.to(x.dtype)
    return y if bias is None else y + bias


@functools.cache
def _packed_in() -> int | None:
    """How many outputs int4 weights are packed in at a time: 64, 32, or None for another layout.

    The layout is the kernel's own and differs between processors, so it is learned from what
    becomes of known codes. In a byte there are the i-th output of a block and the i-th of its
    second half.
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
