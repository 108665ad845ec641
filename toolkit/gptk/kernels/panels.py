"""Products with plain weights in panels, the layout of inference. See cpp/panels.h.

All tensors are on the CPU. All functions raise ValueError for other arguments than they document.
"""

from torch import Tensor

from gptk.kernels.arguments import BFLOAT16, FLOAT32, are, are_floats, fail, refuse
from gptk.kernels.build import library

PANEL = 16
"""Outputs of a panel."""


def to_panels(weight: Tensor, panels: Tensor) -> None:
    """Lay weights out in panels.

    weight: (outputs, inputs), float32, or bfloat16 with an even number of inputs, contiguous;
    panels: (outputs rounded up to whole panels, inputs), of its dtype, contiguous, from a multiple
    of 64 bytes on.
    """
    _check("to_panels", weight, panels)
    if status := library().gptk_convert_panels(
        *(weight.dtype is BFLOAT16, 0, weight.data_ptr(), panels.data_ptr(), *weight.shape)
    ):
        fail(status)


def from_panels(panels: Tensor, weight: Tensor) -> None:
    """The other way round: see `to_panels`."""
    _check("from_panels", weight, panels)
    if status := library().gptk_convert_panels(
        *(weight.dtype is BFLOAT16, 1, weight.data_ptr(), panels.data_ptr(), *weight.shape)
    ):
        fail(status)


def linear_in_panels(
    x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, *, in_float32: bool = False
) -> Tensor:
    """x weightᵀ, plus the bias, for any number of rows.

    x: (…, inputs); panels: see `to_panels`; bias: (outputs,); all of one dtype. Returns (…,
    outputs) in this dtype, or, with in_float32, the same numbers in float32.
    """
    x = x.contiguous()
    inputs = panels.shape[-1]
    bias_address = None
    if bias is not None:
        bias = bias.contiguous()
        bias_address = bias.data_ptr()
        if bias.shape != (outputs,) or not are(x.dtype, bias):
            refuse("linear_in_panels", x=x, bias=bias)
    if (
        not are_floats(x, panels)
        or panels.shape != (outputs + -outputs % PANEL, inputs)
        or x.shape[-1] != inputs
        or not panels.is_contiguous()
        or panels.data_ptr() % 64
        or (inputs % 2 and x.dtype is BFLOAT16)
    ):
        refuse("linear_in_panels", x=x, panels=panels, outputs=outputs)
    dtype = FLOAT32 if in_float32 else x.dtype
    y = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    if status := library().gptk_linear_in_panels(
        *(
            x.dtype is BFLOAT16,
            in_float32,
            x.data_ptr(),
            panels.data_ptr(),
            bias_address,
            y.data_ptr(),
        ),
        *(y.numel() // outputs if outputs else 0, inputs, outputs),
    ):
        fail(status)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear_in_panels`, to the last bit, with weights in their ordinary layout.

    x: (…, inputs); weight: (outputs, inputs), with an even number of inputs in bfloat16; bias:
    (outputs,); all of one dtype, float32 or bfloat16. Returns (…, outputs).
    """
    x, weight = x.contiguous(), weight.contiguous()
    if weight.dim() != 2:
        refuse("linear", weight=weight)
    outputs, inputs = weight.shape
    bias_address = None
    if bias is not None:
        bias = bias.contiguous()
        bias_address = bias.data_ptr()
        if bias.shape != (outputs,) or not are(x.dtype, bias):
            refuse("linear", x=x, bias=bias)
    if (x.dtype is BFLOAT16 and inputs % 2) or x.shape[-1] != inputs or not are_floats(x, weight):
        refuse("linear", x=x, weight=weight)
    y = x.new_empty(*x.shape[:-1], outputs)
    if status := library().gptk_linear(
        *(x.dtype is BFLOAT16, x.data_ptr(), weight.data_ptr(), bias_address, y.data_ptr()),
        *(y.numel() // outputs if outputs else 0, inputs, outputs),
    ):
        fail(status)
    return y


def _check(kernel: str, weight: Tensor, panels: Tensor) -> None:
    if (
        weight.dim() != 2
        or not are_floats(weight, panels)
        or panels.shape != (len(weight) + -len(weight) % PANEL, weight.shape[1])
        or not (weight.is_contiguous() and panels.is_contiguous())
        or panels.data_ptr() % 64
        or (weight.shape[1] % 2 and weight.dtype is BFLOAT16)
    ):
        refuse(kernel, weight=weight, panels=panels)
