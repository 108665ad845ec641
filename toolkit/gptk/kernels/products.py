"""Products of matrices: large ones in bfloat16, for training and for many rows, and those of few
rows with weights, for decoding.

All tensors are on the CPU. All functions raise ValueError for other arguments than they document.
"""

import functools
import math

import torch
from torch import Tensor

from gptk.kernels.arguments import BFLOAT16, FLOAT32, are, are_floats, fail, refuse
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
    if bias is not None:
        bias = bias.contiguous()
    if (
        not a.dim() == b.dim() == y.dim() == 2
        or a.shape[1] != b.shape[0]
        or y.shape != (a.shape[0], b.shape[1])
        or (y.stride(1) != 1 and y.shape[1] > 1)
        or (y.stride(0) < y.shape[1] and y.shape[0] > 1)
        or not (are(BFLOAT16, a) and are_floats(b) and are_floats(y))
        or (bias is not None and not (are(FLOAT32, bias) and bias.shape == y.shape[1:]))
        or (add and y.dtype is not FLOAT32)
    ):
        refuse("product", a=a, b=b, y=y, bias=bias, add=add)
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    a_contiguous_in_depth, b_contiguous_in_depth = a.stride(1) == 1, b.stride(0) == 1
    a_stride = a.stride(0 if a_contiguous_in_depth else 1)
    b_stride = b.stride(1 if b_contiguous_in_depth else 0)
    if status := library().gptk_product(
        *(a.data_ptr(), a_stride, a_contiguous_in_depth),
        *(b.dtype is BFLOAT16, b.data_ptr(), b_stride, b_contiguous_in_depth),
        *(y.dtype is BFLOAT16, y.data_ptr(), y.stride(0)),
        *(None if bias is None else bias.data_ptr(), add, *y.shape, a.shape[1]),
    ):
        fail(status)


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
    x = x.contiguous()
    if x.dim() != 2 or not are_floats(x):
        refuse("column_sums", x=x)
    y = x.new_empty(x.shape[1], dtype=torch.float32)
    if status := library().gptk_column_sums(
        x.dtype is BFLOAT16, x.data_ptr(), y.data_ptr(), *x.shape
    ):
        fail(status)
    return y


def quantized_linear(
    x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """x times quantized weights, plus the bias.

    x: (rows, inputs); weights: uint8, as `pack` lays them out; bits: 4 or 8. Returns (rows,
    outputs), in x's dtype.
    """
    x = x.contiguous()
    bias_address = None
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
        bias_address = bias.data_ptr()
        if bias.shape != (outputs,) or not bias.is_cpu:
            refuse("quantized_linear", x=x, bias=bias, outputs=outputs)
    dtype = x.dtype
    # are_floats(x), without a call: this runs a hundred times for each token
    if x.dim() != 2 or not (dtype is FLOAT32 or dtype is BFLOAT16) or not x.is_cpu:
        refuse("quantized_linear", x=x)
    rows, inputs = x.shape
    _check_packed("quantized_linear", weights, bits, outputs, inputs)
    y = x.new_empty(rows, outputs)
    if status := library().gptk_quantized_linear(
        *(dtype is BFLOAT16, bits, x.data_ptr(), weights.data_ptr()),
        *(bias_address, y.data_ptr(), rows, inputs, outputs),
    ):
        fail(status)
    return y


def pack(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, y: Tensor) -> None:
    """Lay quantized weights out for `quantized_linear`, into y: uint8, 16 outputs a block.

    codes, scale, offset: as gptk.Levels has them; a code has no more than `bits` bits. y:
    contiguous, with room for all, see `packed_bytes`. The layout is in cpp/products.h.
    """
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    _check_levels("pack", codes, scale, offset)
    if (
        bits not in (4, 8)
        or not are(torch.uint8, y)
        or not y.is_contiguous()
        or y.numel() < packed_bytes(codes.shape[0], codes.shape[1], bits)
    ):
        refuse("pack", codes=codes, bits=bits, y=y)
    if status := library().gptk_pack(
        *(bits, codes.data_ptr(), scale.data_ptr(), offset.data_ptr(), y.data_ptr(), *codes.shape)
    ):
        fail(status)


def packed_bytes(outputs: int, inputs: int, bits: int) -> int:
    """The bytes of a matrix as `pack` lays it out: whole blocks of 16 outputs."""
    return -(-outputs // _BLOCK) * (inputs // _GROUP) * (4 + _GROUP * bits // 8) * _BLOCK


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor, y: Tensor) -> None:
    """y = codes · scale + offset, as gptk.Levels has them.

    y: float32 or bfloat16, contiguous, of codes' shape.
    """
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    _check_levels("dequantize", codes, scale, offset)
    if y.shape != codes.shape or not y.is_contiguous() or not are_floats(y):
        refuse("dequantize", codes=codes, y=y)
    if status := library().gptk_dequantize(
        *(y.dtype is BFLOAT16, codes.data_ptr(), scale.data_ptr(), offset.data_ptr()),
        *(y.data_ptr(), scale.numel()),
    ):
        fail(status)


def dequantize_packed(
    weights: Tensor, bits: int, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The dequantized weights of a matrix that `pack` laid out: (outputs, inputs).

    dtype: bfloat16 or float32.
    """
    _check_packed("dequantize_packed", weights, bits, outputs, inputs)
    y = weights.new_empty(outputs, inputs, dtype=dtype)
    if not are_floats(y):
        refuse("dequantize_packed", weights=weights, dtype=dtype)
    if status := library().gptk_dequantize_packed(
        dtype is BFLOAT16, bits, weights.data_ptr(), y.data_ptr(), inputs, outputs
    ):
        fail(status)
    return y


def dequantize_row(weights: Tensor, bits: int, inputs: int, output: int) -> Tensor:
    """The weights of one output, (1, inputs) float32: in a fifth of the time of `dequantize_rows`.

    weights: (blocks, …) as `pack` lays them out.
    """
    block, lane = divmod(output, _BLOCK)
    return dequantize_packed(weights[block], bits, _BLOCK, inputs, FLOAT32)[lane : lane + 1]


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


def _check_packed(kernel: str, weights: Tensor, bits: int, outputs: int, inputs: int) -> None:
    """weights: of just this size, uint8, contiguous."""
    if (
        weights.numel() != _packed_size(bits, outputs, inputs)
        or weights.dtype is not torch.uint8
        or not weights.is_cpu
        or not weights.is_contiguous()
    ):
        refuse(kernel, weights=weights, bits=bits, outputs=outputs, inputs=inputs)


@functools.lru_cache(maxsize=1024)  # decoding asks for each matrix at each step
def _packed_size(bits: int, outputs: int, inputs: int) -> int:
    """The bytes of a packed matrix; -1 for sizes that none has."""
    if (bits != 4 and bits != 8) or inputs % _GROUP or inputs < 0 or outputs < 0:
        return -1
    return packed_bytes(outputs, inputs, bits)


def _check_levels(kernel: str, codes: Tensor, scale: Tensor, offset: Tensor) -> None:
    """codes: (outputs, inputs) uint8; scale, offset: (outputs, groups of 32 inputs) float32."""
    if (
        codes.dim() != 2
        or codes.shape[1] % _GROUP
        or scale.shape != (codes.shape[0], codes.shape[1] // _GROUP)
        or offset.shape != scale.shape
        or not (are(torch.uint8, codes) and are(FLOAT32, scale, offset))
    ):
        refuse(kernel, codes=codes, scale=scale, offset=offset)
