"""Matrices of few levels: codes with a scale and an offset for each group of 32 weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptk import kernels

Precision = Literal["int8", "int4"]
"""int8: 127 steps to each side of zero, a scale for each output. int4: 16 levels from the least to
the largest of 32 weights, with a scale and an offset for each such group."""

GROUP = 32
WEIGHTS_AT_A_TIME = 1 << 18
"""Weights that are worked on at a time, so that what is between takes little memory."""


@dataclass(frozen=True)
class Levels:
    """A matrix as a file has it, (outputs, inputs): w = code · scale + offset, in groups of 32."""

    codes: Tensor
    """(outputs, inputs) uint8: from 0 to 15 with 4 bits, to 255 with 8."""
    scale: Tensor
    """(outputs, groups) float32."""
    offset: Tensor
    """(outputs, groups) float32: the value of code 0."""
    bits: Literal[4, 8]

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """With the codes packed, and scales and offsets of two bytes."""
        return self.codes.numel() * self.bits // 8 + 2 * (self.scale.numel() + self.offset.numel())

    def __getitem__(self, rows: Tensor | slice) -> "Levels":
        return Levels(self.codes[rows], self.scale[rows], self.offset[rows], self.bits)

    @staticmethod
    def stack(parts: "Sequence[Levels]") -> "Levels":
        """Their outputs one after the other. Raises RuntimeError if they do not fit."""
        if len({part.bits for part in parts}) > 1:
            raise RuntimeError("levels of 4 and of 8 bits")
        return Levels(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.offset for part in parts]),
            parts[0].bits,
        )

    def dense(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The numbers. out: where to put them, (outputs, inputs), in its dtype."""
        out = self.codes.new_empty(self.shape, dtype=dtype) if out is None else out
        if out.dtype in (torch.float32, torch.bfloat16) and kernels.available():
            kernels.dequantize(self.codes, self.scale, self.offset, out)
            return out
        dense = out.view(*self.scale.shape, GROUP)
        step = max(1, WEIGHTS_AT_A_TIME // self.shape[1])
        for at in range(0, len(dense), step):
            part = slice(at, at + step)
            codes = self.codes[part].view(dense[part].shape).float()
            dense[part] = torch.addcmul(
                self.offset[part, :, None], codes, self.scale[part, :, None]
            )
        return out


@dataclass(frozen=True)
class NearestLevels:
    """The levels of some outputs when they are asked for, so that those of all are never there."""

    weight: Tensor
    bits: Literal[4, 8]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def __getitem__(self, rows: slice) -> Levels:
        some = self.weight[rows].float()
        return to_four_bits(some) if self.bits == 4 else to_eight_bits(some)


def to_four_bits(weight: Tensor) -> Levels:
    """16 levels from the least to the largest of each 32 weights.

    weight: (outputs, inputs) float32.
    """
    dtype = torch.float16 if kernels.available() else torch.bfloat16
    groups = weight.view(len(weight), -1, GROUP)
    least, most = groups.amin(dim=2), groups.amax(dim=2)
    # Rounded first, as the kernel has them, so that codes fit them.
    scale = ((most - least) / 15).to(dtype).float()
    offset = least.to(dtype).float()
    size = scale[:, :, None].clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - offset[:, :, None]) / size).round_().clamp_(0, 15)
    return Levels(codes.flatten(1).to(torch.uint8), scale, offset, 4)


def to_eight_bits(weight: Tensor) -> Levels:
    """Steps of -127 to 127 times a scale for each output. weight: (outputs, inputs) float32."""
    # Rounded to float16 as the kernel has it, and never below what the largest weight takes:
    # its rounding is at most 2⁻¹¹, and of the smallest numbers 2⁻²⁵.
    least = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = (least * (1 + 2**-11) + 2**-25 * (least > 0)).half().float()
    size = scale.clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((weight / size).round_().clamp_(-127, 127) + 128).to(torch.uint8)
    scale = scale.expand(-1, weight.shape[1] // GROUP)
    return Levels(codes, scale, -128 * scale, 8)


def outputs_at_a_time(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some outputs at a time, and their weights in float32."""
    step = max(1, WEIGHTS_AT_A_TIME // weight.shape[1])
    for at in range(0, len(weight), step):
        part = slice(at, at + step)
        yield part, weight[part].float()
