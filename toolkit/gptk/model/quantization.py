"""Quantized weights: int8 by channel and int4 by groups of 32 inputs, on CPUs.

Decoding reads every weight once a step, so a quarter of the bytes takes about a quarter of the
time. Weights are packed for gptk's kernel (`KernelGroups`) or, where it cannot run, for PyTorch's
(`PyTorchInt8`, `PyTorchInt4`, `PyTorchInt8Groups`), which round activations and scales to bfloat16.
See gptk.model.quantized_by_pytorch. On CUDA torchao quantizes, see gptk.model.torchao.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.distribution import install_command
from gptk.errors import DeviceError, OptionError
from gptk.kernels.formats import BLOCK
from gptk.model.levels import GROUP, WEIGHTS_AT_A_TIME, Levels, StoredLevels
from gptk.model.packing import Packed
from gptk.model.quantized_by_pytorch import (
    PYTORCH_BLOCK,
    PyTorchInt4,
    PyTorchInt8,
    PyTorchInt8Groups,
)
from gptk.model.rounding import NearestLevels, Precision
from gptk.model.segments import Segments
from gptk.system.memory import new_bytes

Quantize = Literal["auto", "none", "int8", "int4"]
"""What becomes of the matrices of linear layers. auto: those that a file has quantized, as Levels,
stay so where `keeps_levels`; none: all are dense; int8, int4: all are rounded, see Precision."""


def check_quantize(quantize: str, device: torch.device) -> None:
    """Raises OptionError for what is no Quantize, DeviceError if a device does not have it."""
    if quantize not in get_args(Quantize):
        raise OptionError(f"quantize is {quantize!r}; it must be auto, none, int8 or int4")
    if device.type == "cpu" or quantize in ("auto", "none"):
        return
    if device.type != "cuda":
        raise DeviceError(f"quantize {quantize} needs the device cpu or cuda, not {device.type}")
    from gptk.model.torchao import is_installed, why_not_int4

    if not is_installed():
        raise DeviceError(
            f"quantize {quantize} on cuda needs torchao; install it: {install_command('torchao')}"
        )
    if quantize == "int4" and (reason := why_not_int4(device)) is not None:
        raise DeviceError(f"quantize int4 is not possible here: {reason}; int8 is")


def keeps_levels(segments: Segments, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix that a file has quantized stays so, with activations of a dtype.

    It does on a CPU where gptk's kernels run, which compute what the dequantized matrix gives.
    PyTorch's kernels round activations to bfloat16, so they are used if activations are bfloat16,
    and the processor has instructions that they are written for. They have groups of 32 inputs with
    4 or 8 bits.
    """
    if device.type != "cpu":
        return False
    if kernels.available():
        return segments.can_be_packed
    by_pytorch = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
    return dtype == torch.bfloat16 and by_pytorch and segments.have_codes


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


def bytes_of(shape: torch.Size, kind: str, stored: Segments | None = None) -> int:
    """The bytes that a matrix of that shape takes in memory, on a CPU.

    kind: float32, bfloat16, or int and a number of bits. stored: how it is stored in a file, if it
    stays so; else int8 has scales by channel.
    """
    count = shape.numel()
    if not kind.startswith("int"):
        return count * (4 if kind == "float32" else 2)
    outputs, inputs = shape
    if kernels.available():
        if stored is None:
            format = kernels.FORMATS[kernels.FORMAT_OF_BITS[int(kind[3:])]]
            stored = Segments([(format, outputs)])
        return stored.packed_bytes(inputs)
    if kind == "int8" and stored is None:
        return count + 2 * outputs
    halves = 2 if kind == "int8" else 1
    padded = outputs + -outputs % PYTORCH_BLOCK
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
    """Weights in the formats of GGUF files, laid out for gptk's kernels.

    See gptk.kernels.formats.
    """

    def __init__(self, levels: Levels | NearestLevels) -> None:
        """levels: of up to three segments, all but the last with whole blocks of outputs."""
        parts: Sequence[Levels | NearestLevels] = (
            levels.segments if isinstance(levels, Levels) else (levels,)
        )
        self._set(Segments((part.format, part.shape[0]) for part in parts), levels.shape[1])
        self.weights = new_bytes(self.segments.packed_bytes(self._inputs))
        """(bytes,) uint8: the segments one after the other."""
        for part, weights in zip(parts, self._parts(), strict=True):
            _pack_segment(part, weights)

    @classmethod
    def of_packed(cls, weights: Tensor, segments: "Segments", inputs: int) -> "KernelGroups":
        """Weights that have been packed before. weights: (bytes,) uint8, which are not copied."""
        packed = cls.__new__(cls)
        packed._set(segments, inputs)
        packed.weights = weights
        return packed

    def _set(self, segments: "Segments", inputs: int) -> None:
        self.segments, self._inputs = segments, inputs
        self.kind, self._outputs = segments.kind, segments.outputs

    def _parts(self) -> Sequence[Tensor]:
        """The weights of each segment."""
        if len(self.segments) == 1:
            return (self.weights,)
        return torch.split(
            self.weights, [s.packed_bytes(self._inputs) for s in self.segments.each()]
        )

    def packs(self, levels: Levels) -> bool:
        """Whether this can be the packed matrix: the sizes, and the first and the last outputs."""
        if self.segments != Segments.of(levels) or self._inputs != levels.shape[1]:
            return False
        if not self.nbytes:
            return True
        for part, weights in zip(levels.segments, self._parts(), strict=True):
            blocks = weights.view(-(-part.shape[0] // BLOCK), -1)
            last = (len(blocks) - 1) * BLOCK
            for start, block in ((0, blocks[0]), (last, blocks[-1])):
                if not torch.equal(block, KernelGroups(part[start : start + BLOCK]).weights):
                    return False
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self._outputs, self._inputs

    def kernel_segments(self) -> list[tuple[Tensor, kernels.Format, int]]:
        """What gptk.kernels.walk.quantized_matrix takes."""
        return [
            (weights, format, outputs)
            for weights, (format, outputs) in zip(self._parts(), self.segments, strict=True)
        ]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() != 2:
            return self.linear(x.flatten(0, -2), bias).view(*x.shape[:-1], self._outputs)
        dtype = x.dtype
        if dtype == torch.float16:
            return self.linear(x.float(), bias).half()
        if dtype not in (torch.float32, torch.bfloat16):
            return F.linear(x, self.dense(dtype), bias)
        if len(self.segments) == 1:
            ((format, outputs),) = self.segments
            return kernels.quantized_linear(x, self.weights, bias, format, outputs)
        biases = (
            [None] * len(self.segments) if bias is None else torch.split(bias, self.segments.sizes)
        )
        return torch.cat(
            [
                kernels.quantized_linear(x, weights, bias, format, outputs)
                for (weights, format, outputs), bias in zip(
                    self.kernel_segments(), biases, strict=True
                )
            ],
            dim=1,
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        if dtype not in (torch.float32, torch.bfloat16):
            return self.dense(torch.float32).to(dtype)
        parts = [
            kernels.dequantize_packed(weights, format, outputs, self._inputs, dtype)
            for weights, format, outputs in self.kernel_segments()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized weights of the outputs with these numbers, (n,): (n, inputs).

        Raises IndexError for numbers of no output.
        """
        if len(outputs):
            low, high = outputs.aminmax()
            if not 0 <= low <= high < self._outputs:
                raise IndexError(f"rows from {low} to {high} of {self._outputs}")
        ((format, count),) = self.segments  # an embedding is one tensor of its file
        rows = kernels.dequantize_rows(
            self.weights, format, count, self._inputs, outputs, torch.float32
        )
        return rows.to(dtype)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @property
    def device(self) -> torch.device:
        return self.weights.device


def _pack_segment(levels: Levels | NearestLevels, weights: Tensor) -> None:
    """Lay out a matrix in one format; some outputs at a time, if codes are made for that."""
    outputs, inputs = levels.shape
    if isinstance(levels, StoredLevels):
        levels.pack_into(weights)
        return
    step = max(1, WEIGHTS_AT_A_TIME // (BLOCK * max(1, inputs))) * BLOCK
    bytes_of_output = levels.format.packed * (inputs // levels.format.unit)
    for start in range(0, outputs, step):
        levels[start : start + step].pack_into(weights[start * bytes_of_output :])
