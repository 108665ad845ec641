"""Normalization, activations and rotary embeddings.

All tensors of a call are on the CPU and have one dtype, float32 or bfloat16. All functions raise
ValueError for other arguments than they document.
"""

import torch
from torch import Tensor

from gptk.kernels.arguments import BFLOAT16, are_floats, fail, refuse
from gptk.kernels.build import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis, whose size is a multiple of 16."""
    x, weight = x.contiguous(), weight.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    if size % 16 or weight.shape != (size,) or not are_floats(x, weight):
        refuse("rms_norm", x=x, weight=weight)
    if size and (
        status := library().gptk_rms_norm(
            *(x.dtype is BFLOAT16, x.data_ptr(), weight.data_ptr(), eps, y.data_ptr()),
            *(x.numel() // size, size),
        )
    ):
        fail(status)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean x) / √(var x + eps) · weight, plus the bias, over the last axis."""
    x, weight, size = x.contiguous(), weight.contiguous(), x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    if (
        weight.shape != (size,)
        or (bias is not None and bias.shape != (size,))
        or not are_floats(x, weight, bias)
    ):
        refuse("layer_norm", x=x, weight=weight, bias=bias)
    if size and (
        status := library().gptk_layer_norm(
            *(x.dtype is BFLOAT16, x.data_ptr(), weight.data_ptr()),
            *(None if bias is None else bias.data_ptr(), eps, y.data_ptr()),
            *(x.numel() // size, size),
        )
    ):
        fail(status)
    return y


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up. x: (…, gate and up), each of a size that is a multiple of 16."""
    x = x.contiguous()
    both = x.shape[-1]
    if both % 32 or not are_floats(x):
        refuse("swiglu", x=x)
    size = both // 2
    y = x.new_empty(*x.shape[:-1], size)
    if size and (
        status := library().gptk_swiglu(
            x.dtype is BFLOAT16, x.data_ptr(), y.data_ptr(), x.numel() // both, size
        )
    ):
        fail(status)
    return y


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2. Has gradients, where these are on."""
    if torch.is_grad_enabled():
        y: Tensor = torch.ops.gptk.gelu(x)
        return y
    return gelu_or_gradient(x, None)


def gelu_or_gradient(x: Tensor, dy: Tensor | None) -> Tensor:
    """gelu(x); or, from its gradient dy, the gradient of x."""
    x = x.contiguous()
    if dy is None:
        dy_address = None
        if not are_floats(x):
            refuse("gelu", x=x)
    else:
        dy = dy.contiguous()
        dy_address = dy.data_ptr()
        if dy.shape != x.shape or not are_floats(x, dy):
            refuse("gelu", x=x, dy=dy)
    y = torch.empty_like(x)
    if status := library().gptk_gelu(
        x.dtype is BFLOAT16, x.data_ptr(), dy_address, y.data_ptr(), x.numel()
    ):
        fail(status)
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding, the halves of a head as pairs.

    x: (rows, time, heads, head_dim), head_dim a multiple of 32; cosines, sines: (1 or rows, time,
    heads, head_dim), the sines of the first half negative.
    """
    x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
    shape = cosines.shape
    if (
        x.dim() != 4
        or sines.shape != shape
        or (shape != x.shape and shape != (1, *x.shape[1:]))
        or shape[3] % 32
        or not are_floats(x, cosines, sines)
    ):
        refuse("rotate", x=x, cosines=cosines, sines=sines)
    y, size = torch.empty_like(x), shape[3]
    if x.numel() and (
        status := library().gptk_rotate(
            *(x.dtype is BFLOAT16, x.data_ptr(), cosines.data_ptr(), sines.data_ptr()),
            *(y.data_ptr(), x.numel() // size, cosines.numel() // size, size),
        )
    ):
        fail(status)
    return y
