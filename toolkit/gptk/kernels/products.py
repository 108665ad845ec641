"""Products of matrices."""

import torch
from torch import Tensor

from gptk.kernels.build import library


def product(
    a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> None:
    """y = a b, plus the bias, plus y itself, float32, with `add`; in bfloat16, summed in float32.

    a: (rows, depth), bfloat16; b: (depth, columns) and y: (rows, columns), bfloat16 or float32,
    which is rounded on the way; bias: (columns,), float32. y's rows are without gaps.
    """
    assert y.dtype == torch.float32 or not add
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    a_along, b_along = a.stride(1) == 1, b.stride(0) == 1
    library().gptk_product(
        *(a.data_ptr(), a.stride(0 if a_along else 1), a_along),
        *(b.dtype == torch.bfloat16, b.data_ptr(), b.stride(1 if b_along else 0), b_along),
        *(y.dtype == torch.bfloat16, y.data_ptr(), y.stride(0)),
        *(None if bias is None else bias.data_ptr(), add, *y.shape, a.shape[1]),
    )


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, inputs) times weights (outputs, inputs), plus the bias, as under autocast: bfloat16.

    weight and bias: float32, as their gradients are.
    """
    rows = x.flatten(0, -2).to(torch.bfloat16)
    y: Tensor = torch.ops.gptk.product(rows, weight.t(), bias, False)
    return y.view(*x.shape[:-1], len(weight))


def new_product(a: Tensor, b: Tensor, bias: Tensor | None, single: bool) -> Tensor:
    """`product` into new memory, float32 where `single` says so, else bfloat16."""
    y = a.new_empty(len(a), b.shape[1], dtype=torch.float32 if single else torch.bfloat16)
    product(a, b, y, None if bias is None else bias.float())
    return y


def column_sums(x: Tensor) -> Tensor:
    """The sums of the columns of x (rows, columns), float32."""
    x = x.contiguous()
    y = x.new_empty(x.shape[1], dtype=torch.float32)
    library().gptk_column_sums(x.dtype == torch.bfloat16, x.data_ptr(), y.data_ptr(), *x.shape)
    return y


def linear(x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int) -> Tensor:
    """x (rows, inputs) times weights in groups of 32, plus the bias: (rows, outputs), as x is.

    weights: uint8, as gptk.quantization.Groups packs them; bits: 4 or 8.
    """
    x = x.contiguous()
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.gptk.few_rows_linear(x, weights, bits, outputs)
        return y if bias is None else y + bias
    return few_rows_linear(x, weights, bias, bits, outputs)


def few_rows_linear(
    x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """`linear` by the kernel itself, for what no compiler traces."""
    if bias is not None:
        bias = bias.to(x.dtype)
    rows, inputs = x.shape
    y = x.new_empty(rows, outputs)
    library().gptk_linear(
        *(x.dtype == torch.bfloat16, bits, x.data_ptr(), weights.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), rows, inputs, outputs),
    )
    return y


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, inputs) times weights as they are, (outputs, inputs), plus the bias, for few rows.

    All of one dtype; inputs a multiple of 32. See FEW_ROWS.
    """
    outputs, inputs = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    library().gptk_dense(
        *(x.dtype == torch.bfloat16, x.data_ptr(), weight.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(x.numel() // inputs, inputs, outputs),
    )
    return y


FEW_ROWS = {torch.float32: 24, torch.bfloat16: 32}
"""From there on PyTorch's products are as fast."""


def pack(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, y: Tensor) -> None:
    """The weights of `linear` from those of some gptk.Levels, into y: uint8, 16 outputs a block."""
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    library().gptk_pack(
        *(bits, codes.data_ptr(), scale.data_ptr(), offset.data_ptr(), y.data_ptr(), *codes.shape)
    )


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor, y: Tensor) -> None:
    """y = codes · scale + offset for some gptk.Levels, into y: float32 or bfloat16, contiguous."""
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    library().gptk_dequantize(
        *(y.dtype == torch.bfloat16, codes.data_ptr(), scale.data_ptr(), offset.data_ptr()),
        *(y.data_ptr(), scale.numel()),
    )


def expand(weights: Tensor, bits: int, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weights of `linear` as numbers: (outputs, inputs), bfloat16 or float32."""
    y = weights.new_empty(outputs, inputs, dtype=dtype)
    library().gptk_expand(
        dtype == torch.bfloat16, bits, weights.data_ptr(), y.data_ptr(), inputs, outputs
    )
    return y
