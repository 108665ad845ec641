"""Products of matrices: large ones in bfloat16, for training and for many rows, and those of few
rows with weights, for decoding.

All tensors are on the CPU.
"""

import math

import torch
from torch import Tensor

from gptk.kernels.build import library
from gptk.kernels.formats import Format


def product(
    a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> None:
    """y = a b, plus the bias, plus y itself with `add`: bfloat16 products, summed in float32.

    a: (rows, depth), bfloat16; b: (depth, columns) and y: (rows, columns), bfloat16 or float32; b
    is rounded to bfloat16. bias: (columns,), float32. Either of a and b may be row-major or
    column-major; each row of y is contiguous, and rows do not overlap. With `add` y must be
    float32.
    """
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    library().product(a, b, y, bias, add)


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer under autocast: x weightᵀ, plus the bias, in bfloat16. Has gradients.

    x: (…, inputs); weight: (outputs, inputs) and bias: (outputs,), float32, as their gradients
    are. Returns (…, outputs).
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(torch.bfloat16)
    y: Tensor = torch.ops.gptk.product(rows, weight.t(), bias, False)
    return y.view(*x.shape[:-1], len(weight))


def new_product(a: Tensor, b: Tensor, bias: Tensor | None, in_float32: bool) -> Tensor:
    """`product` as a new tensor, in float32 or bfloat16."""
    y = a.new_empty(len(a), b.shape[1], dtype=torch.float32 if in_float32 else torch.bfloat16)
    product(a, b, y, None if bias is None else bias.float())
    return y


def column_sums(x: Tensor) -> Tensor:
    """The sums of the columns of x, (rows, columns): (columns,), float32."""
    y: Tensor = library().column_sums(x)
    return y


def quantized_linear(
    x: Tensor, weights: Tensor, bias: Tensor | None, format: Format, outputs: int
) -> Tensor:
    """x times quantized weights, plus the bias.

    x: (rows, inputs); weights: uint8, as `pack` and `pack_stored` lay them out. Returns (rows,
    outputs), in x's dtype.
    """
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    y: Tensor = library().quantized_linear(x, weights, bias, format.number, outputs)
    return y


def pack(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, y: Tensor) -> None:
    """Lay quantized weights out for `quantized_linear`, into y: uint8, 16 outputs a block.

    codes, scale, offset: as gptk.Levels has them; a code has no more than `bits` bits, 4 or 8. y:
    contiguous, with room for all, see `packed_bytes`; its format is FORMAT_OF_BITS[bits].
    """
    library().pack(codes, scale, offset, bits, y)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor, y: Tensor) -> None:
    """y = codes · scale + offset, as gptk.Levels has them.

    y: float32 or bfloat16, contiguous, of codes' shape.
    """
    library().dequantize(codes, scale, offset, y)


def dequantize_packed(
    weights: Tensor, format: Format, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The dequantized weights of a matrix that was laid out: (outputs, inputs).

    dtype: bfloat16 or float32.
    """
    y: Tensor = library().dequantize_packed(weights, format.number, outputs, inputs, dtype)
    return y


def dequantize_rows(
    weights: Tensor,
    format: Format,
    outputs: int,
    inputs: int,
    wanted: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The weights of some outputs: (n, inputs). wanted: (n,) int64, their numbers."""
    y: Tensor = library().dequantize_rows(weights, format.number, outputs, inputs, wanted, dtype)
    return y
