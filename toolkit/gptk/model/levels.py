"""Quantized matrices: integer codes, with a scale and an offset for each group of 32 weights.

A weight is code · scale + offset: one of 16 levels of its group with 4 bits, one of 256 with 8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptk import kernels

Precision = Literal["int8", "int4"]
"""int8: 127 steps to each side of zero, a scale for each output. int4: 16 levels from the smallest
to the largest of each 32 weights, a scale and an offset for each such group."""

GROUP = 32
"""Consecutive inputs of an output whose weights share a scale and an offset."""
WEIGHTS_AT_A_TIME = 1 << 16
"""Weights that are converted at a time, so that intermediate tensors take little memory."""


@dataclass(frozen=True)
class Levels:
    """A quantized matrix (outputs, inputs): w = code · scale + offset, in groups of 32 inputs.

    Raises ValueError for tensors of other shapes, dtypes or devices. That codes of 4 bits are below
    16 is checked where they are packed.
    """

    codes: Tensor
    """(outputs, inputs) uint8: 0 to 15 with 4 bits, 0 to 255 with 8."""
    scale: Tensor
    """(outputs, groups) float32."""
    offset: Tensor
    """(outputs, groups) float32: the weight whose code is 0."""
    bits: Literal[4, 8]

    def __post_init__(self) -> None:
        groups = (*self.codes.shape[:-1], self.codes.shape[-1] // GROUP) if self.codes.dim() else ()
        problem = None
        if self.bits not in (4, 8):
            problem = f"bits are 4 or 8, not {self.bits}"
        elif self.codes.dtype != torch.uint8:
            problem = f"codes are uint8, not {self.codes.dtype}"
        elif self.codes.dim() != 2 or self.codes.shape[1] % GROUP:
            problem = f"codes are (outputs, groups · {GROUP}), not {tuple(self.codes.shape)}"
        for name, x in (("scale", self.scale), ("offset", self.offset)):
            if x.dtype != torch.float32:
                problem = problem or f"the {name} is float32, not {x.dtype}"
            elif x.shape != groups or x.device != self.codes.device:
                problem = problem or (
                    f"the {name} is {groups} on {self.codes.device}, not {tuple(x.shape)} on "
                    f"{x.device}"
                )
        if problem is not None:
            raise ValueError(f"not the levels of a quantized matrix: {problem}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """The size with packed codes, and with scales and offsets of two bytes."""
        return self.codes.numel() * self.bits // 8 + 2 * (self.scale.numel() + self.offset.numel())

    def __getitem__(self, rows: Tensor | slice) -> "Levels":
        return Levels(self.codes[rows], self.scale[rows], self.offset[rows], self.bits)

    @staticmethod
    def stack(parts: "Sequence[Levels]") -> "Levels":
        """Concatenate matrices by outputs. Raises RuntimeError if bits or inputs differ."""
        if len({part.bits for part in parts}) > 1:
            raise RuntimeError("levels of 4 and of 8 bits")
        return Levels(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.offset for part in parts]),
            parts[0].bits,
        )

    def dense(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The dequantized weights, (outputs, inputs), in `dtype`; or in `out`, and in its dtype."""
        out = self.codes.new_empty(self.shape, dtype=dtype) if out is None else out
        if out.shape != self.shape or not out.is_contiguous():
            raise ValueError(f"weights {tuple(self.shape)} into {tuple(out.shape)}, or with gaps")
        if out.dtype in (torch.float32, torch.bfloat16) and kernels.available():
            kernels.dequantize(self.codes, self.scale, self.offset, out)
            return out
        dense = out.view(*self.scale.shape, GROUP)
        step = max(1, WEIGHTS_AT_A_TIME // max(1, self.shape[1]))
        for start in range(0, len(dense), step):
            part = slice(start, start + step)
            codes = self.codes[part].reshape(dense[part].shape).float()
            dense[part] = torch.addcmul(
                self.offset[part, :, None], codes, self.scale[part, :, None]
            )
        return out


@dataclass(frozen=True)
class NearestLevels:
    """A matrix that is quantized when it is indexed: its codes are never all in memory at once.

    Weights are rounded to the nearest level, see `to_four_bits` and `to_eight_bits`.
    """

    weight: Tensor
    bits: Literal[4, 8]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def __getitem__(self, rows: slice) -> Levels:
        weight = self.weight[rows].float()
        return to_four_bits(weight) if self.bits == 4 else to_eight_bits(weight)


def to_four_bits(weight: Tensor) -> Levels:
    """Round to 16 levels from the smallest to the largest of each 32 weights.

    weight: (outputs, inputs) float32.
    """
    dtype = torch.float16 if kernels.available() else torch.bfloat16
    groups = weight.view(len(weight), -1, GROUP)
    smallest, largest = groups.amin(dim=2), groups.amax(dim=2)
    # Rounded to the kernel's dtype before the codes are computed from them.
    scale = ((largest - smallest) / 15).to(dtype).float()
    offset = smallest.to(dtype).float()
    step = scale[:, :, None].clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - offset[:, :, None]) / step).round_().clamp_(0, 15)
    return Levels(codes.flatten(1).to(torch.uint8), scale, offset, 4)


def to_eight_bits(weight: Tensor) -> Levels:
    """Round to -127 to 127 times a scale for each output. weight: (outputs, inputs) float32."""
    # The scale is rounded to the kernel's float16 before the codes are computed from it, but never
    # to less than the largest weight needs: the rounding error is at most 2⁻¹¹, relative to the
    # scale, or 2⁻²⁵ for the smallest scales.
    least = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = (least * (1 + 2**-11) + 2**-25 * (least > 0)).half().float()
    step = scale.clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((weight / step).round_().clamp_(-127, 127) + 128).to(torch.uint8)
    scale = scale.expand(-1, weight.shape[1] // GROUP)
    return Levels(codes, scale, -128 * scale, 8)


def outputs_at_a_time(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of outputs, each with its weights in float32. See WEIGHTS_AT_A_TIME."""
    step = max(1, WEIGHTS_AT_A_TIME // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        outputs = slice(start, start + step)
        yield outputs, weight[outputs].float()
