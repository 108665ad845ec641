"""Rounding weights to the nearest of a few levels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptk import kernels
from gptk.model.levels import GROUP, WEIGHTS_AT_A_TIME, Levels

Precision = Literal["int8", "int4"]
"""int8: 127 steps to each side of zero, a scale for each output. int4: 16 levels from the smallest
to the largest of each 32 weights, a scale and an offset for each such group."""


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

    @property
    def format(self) -> kernels.Format:
        return kernels.FORMATS[kernels.FORMAT_OF_BITS[self.bits]]

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
