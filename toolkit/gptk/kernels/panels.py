"""Products with plain weights in panels, the layout of inference. See cpp/panels.h.

All tensors are on the CPU.
"""

from torch import Tensor

from gptk.kernels.build import library

PANEL = 16
"""Outputs of a panel."""


def to_panels(weight: Tensor, panels: Tensor) -> None:
    """Lay weights out in panels.

    weight: (outputs, inputs), float32, or bfloat16 with an even number of inputs, contiguous;
    panels: (outputs rounded up to whole panels, inputs), of its dtype, contiguous, from a multiple
    of 64 bytes on.
    """
    library().to_panels(weight, panels)


def from_panels(panels: Tensor, weight: Tensor) -> None:
    """The other way round: see `to_panels`."""
    library().from_panels(weight, panels)


def linear_in_panels(
    x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, *, in_float32: bool = False
) -> Tensor:
    """x weightᵀ, plus the bias, for any number of rows.

    x: (…, inputs); panels: see `to_panels`; bias: (outputs,); all of one dtype. Returns (…,
    outputs) in this dtype, or, with in_float32, the same numbers in float32.
    """
    y: Tensor = library().linear_in_panels(x, panels, outputs, bias, in_float32)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear_in_panels`, to the last bit, with weights in their ordinary layout.

    x: (…, inputs); weight: (outputs, inputs), with an even number of inputs in bfloat16; bias:
    (outputs,); all of one dtype, float32 or bfloat16. Returns (…, outputs).
    """
    y: Tensor = library().linear(x, weight, bias)
    return y
