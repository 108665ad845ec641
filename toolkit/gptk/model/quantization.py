"""Quantized weights: int8 by channel and int4 by groups of 32 inputs, on CPUs.

Decoding reads every weight once a step, so a quarter of the bytes takes about a quarter of the
time. Weights are packed for gptk's kernel (`KernelGroups`) or, where it cannot run, for PyTorch's
(`PyTorchInt8`, `PyTorchInt4`, `PyTorchInt8Groups`), which round activations and scales to bfloat16.
See gptk.model.quantized_by_pytorch. On CUDA torchao quantizes, see gptk.model.torchao.
"""

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
)
from gptk.model.packing import Packed
from gptk.model.quantized_by_pytorch import (
    PYTORCH_BLOCK,
    PyTorchInt4,
    PyTorchInt8,
    PyTorchInt8Groups,
)
from gptk.system.memory import new_bytes

Quantize = Literal["auto", "none", "int8", "int4"]
"""What becomes of the matrices of linear layers. auto: those that a file has quantized, as Levels,
stay so where `keeps_levels`; none: all are dense; int8, int4: all are rounded, see Precision."""

_ROWS_AT_A_TIME = 256
"""Rows that are looked up at a time, so that the blocks that they are in take little memory."""
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
    from gptk.model.torchao import is_installed, why_not_int4

    if not is_installed():
        raise DeviceError(
            f"quantize {quantize} on cuda needs torchao; install it: {install_command('torchao')}"
        )
    if quantize == "int4" and (reason := why_not_int4(device)) is not None:
        raise DeviceError(f"quantize int4 is not possible here: {reason}; int8 is")


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
        if count := len(outputs):
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
