"""Products of matrices: large ones in bfloat16, for training and for many rows, and those of few
rows with weights, for decoding.

All tensors are on the CPU.
"""

import math

import torch
from torch import Tensor

from gptk.kernels.build import library

_GROUP, _BLOCK = 32, 16
"""Inputs that share a scale and an offset; outputs of a block. As in cpp/products.h."""


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
    x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """x times quantized weights, plus the bias.

    x: (rows, inputs); weights: uint8, as `pack` lays them out; bits: 4 or 8. Returns (rows,
    outputs), in x's dtype.
    """
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    y: Tensor = library().quantized_linear(x, weights, bias, bits, outputs)
    return y


def pack(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, y: Tensor) -> None:
    """Lay quantized weights out for `quantized_linear`, into y: uint8, 16 outputs a block.

    codes, scale, offset: as gptk.Levels has them; a code has no more than `bits` bits. y:
    contiguous, with room for all, see `packed_bytes`. The layout is in cpp/products.h.
    """
    library().pack(codes, scale, offset, bits, y)


def packed_bytes(outputs: int, inputs: int, bits: int) -> int:
    """The bytes of a matrix as `pack` lays it out: whole blocks of 16 outputs."""
    return -(-outputs // _BLOCK) * (inputs // _GROUP) * (4 + _GROUP * bits // 8) * _BLOCK


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor, y: Tensor) -> None:
    """y = codes · scale + offset, as gptk.Levels has them.

    y: float32 or bfloat16, contiguous, of codes' shape.
    """
    library().dequantize(codes, scale, offset, y)


def dequantize_packed(
    weights: Tensor, bits: int, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The dequantized weights of a matrix that `pack` laid out: (outputs, inputs).

    dtype: bfloat16 or float32.
    """
    y: Tensor = library().dequantize_packed(weights, bits, outputs, inputs, dtype)
    return y


def dequantize_row(weights: Tensor, bits: int, inputs: int, output: int) -> Tensor:
    """The weights of one output, (1, inputs) float32: in a fifth of the time of `dequantize_rows`.

    weights: (blocks, …) as `pack` lays them out.
    """
    block, lane = divmod(output, _BLOCK)
    return dequantize_packed(weights[block], bits, _BLOCK, inputs, torch.float32)[lane : lane + 1]


def dequantize_rows(weights: Tensor, bits: int, inputs: int, outputs: Tensor) -> Tensor:
    """The weights of these outputs, (n,): (n, inputs) float32, by PyTorch's operations.

    weights: (blocks, groups, bytes of a group) as `pack` lays them out.
    """
    blocks, lane = weights[outputs // _BLOCK], outputs % _BLOCK
    count, groups = len(outputs), inputs // _GROUP
    row = torch.arange(count, device=outputs.device)
    # (count, groups, 2): the group's scale and offset, of the 16 that a block has of each.
    factors = blocks[:, :, : 4 * _BLOCK].view(torch.float16)
    factors = factors.view(count, groups, 2, _BLOCK)[row, :, :, lane].float()
    codes = blocks[:, :, 4 * _BLOCK :].view(count, groups, bits, _BLOCK, 4)
    codes = codes[row, :, :, lane].flatten(2)
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=2)
    scale, offset = factors[:, :, :1], factors[:, :, 1:]
    return torch.addcmul(offset, codes.float(), scale).flatten(1)
