"""Products of matrices: bfloat16 ones for training, and of a few rows with weights for decoding."""

import torch
from torch import Tensor

from gptk.kernels.build import library

FEW_ROWS = {torch.float32: 24, torch.bfloat16: 32}
"""From this many rows on, PyTorch's products with plain weights are as fast as `linear`."""


def product(
    a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> None:
    """y = a b, plus the bias, plus y itself with `add`: bfloat16 products, summed in float32.

    a: (rows, depth), bfloat16; b: (depth, columns) and y: (rows, columns), bfloat16 or float32; b
    is rounded to bfloat16. bias: (columns,), float32. Either of a and b may be row-major or
    column-major; each row of y is contiguous. With `add` y must be float32.
    """
    assert y.dtype == torch.float32 or not add
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    a_contiguous_in_depth, b_contiguous_in_depth = a.stride(1) == 1, b.stride(0) == 1
    a_stride = a.stride(0 if a_contiguous_in_depth else 1)
    b_stride = b.stride(1 if b_contiguous_in_depth else 0)
    library().gptk_product(
        *(a.data_ptr(), a_stride, a_contiguous_in_depth),
        *(b.dtype == torch.bfloat16, b.data_ptr(), b_stride, b_contiguous_in_depth),
        *(y.dtype == torch.bfloat16, y.data_ptr(), y.stride(0)),
        *(None if bias is None else bias.data_ptr(), add, *y.shape, a.shape[1]),
    )


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer under autocast: x weightᵀ, plus the bias, in bfloat16. Has gradients.

    x: (…, inputs); weight: (outputs, inputs) and bias: (outputs,), float32, as their gradients
    are. Returns (…, outputs).
    """
    rows = x.flatten(0, -2).to(torch.bfloat16)
    y: Tensor = torch.ops.gptk.product(rows, weight.t(), bias, False)
    return y.view(*x.shape[:-1], len(weight))


def new_product(a: Tensor, b: Tensor, bias: Tensor | None, in_float32: bool) -> Tensor:
    """`product` as a new tensor, in float32 or bfloat16."""
    y = a.new_empty(len(a), b.shape[1], dtype=torch.float32 if in_float32 else torch.bfloat16)
    product(a, b, y, None if bias is None else bias.float())
    return y


def column_sums(x: Tensor) -> Tensor:
    """The sums of the columns of x, (rows, columns): (columns,), float32."""
    x = x.contiguous()
    y = x.new_empty(x.shape[1], dtype=torch.float32)
    library().gptk_column_sums(x.dtype == torch.bfloat16, x.data_ptr(), y.data_ptr(), *x.shape)
    return y


def quantized_linear(
    x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """x times quantized weights, plus the bias.

    x: (rows, inputs); weights: uint8, as `pack` lays them out; bits: 4 or 8. Returns (rows,
    outputs), in x's dtype.
    """
    x = x.contiguous()
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.gptk.quantized_linear(x, weights, bits, outputs)
        return y if bias is None else y + bias
    return run_quantized_linear(x, weights, bias, bits, outputs)


def run_quantized_linear(
    x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """`quantized_linear` by a call of the kernel, which no compiler can trace."""
    if bias is not None:
        bias = bias.to(x.dtype)
    rows, inputs = x.shape
    y = x.new_empty(rows, outputs)
    library().gptk_quantized_linear(
        *(x.dtype == torch.bfloat16, bits, x.data_ptr(), weights.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), rows, inputs, outputs),
    )
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ, plus the bias, for few rows: see FEW_ROWS.

    x: (…, inputs); weight: (outputs, inputs), inputs a multiple of 32; all of one dtype. Returns
    (…, outputs).
    """
    outputs, inputs = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    library().gptk_linear(
        *(x.dtype == torch.bfloat16, x.data_ptr(), weight.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(x.numel() // inputs, inputs, outputs),
    )
    return y


def pack(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, y: Tensor) -> None:
    """Lay quantized weights out for `quantized_linear`, into y: uint8, 16 outputs a block.

    codes, scale, offset: as gptk.Levels has them. The layout is in cpp/products.h.
    """
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    library().gptk_pack(
        *(bits, codes.data_ptr(), scale.data_ptr(), offset.data_ptr(), y.data_ptr(), *codes.shape)
    )


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor, y: Tensor) -> None:
    """y = codes · scale + offset, as gptk.Levels has them. y: float32 or bfloat16, contiguous."""
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    library().gptk_dequantize(
        *(y.dtype == torch.bfloat16, codes.data_ptr(), scale.data_ptr(), offset.data_ptr()),
        *(y.data_ptr(), scale.numel()),
    )


def dequantize_packed(
    weights: Tensor, bits: int, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The dequantized weights of a matrix that `pack` laid out: (outputs, inputs).

    dtype: bfloat16 or float32.
    """
    y = weights.new_empty(outputs, inputs, dtype=dtype)
    library().gptk_dequantize_packed(
        dtype == torch.bfloat16, bits, weights.data_ptr(), y.data_ptr(), inputs, outputs
    )
    return y
