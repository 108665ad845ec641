"""Normalization, activations and rotary embeddings. All tensors of a call have one dtype."""

import torch
from torch import Tensor

from gptk.kernels.build import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis, whose size is a multiple of 16."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    library().gptk_rms_norm(
        *(x.dtype == torch.bfloat16, x.data_ptr(), weight.data_ptr(), eps, y.data_ptr()),
        *(x.numel() // size, size),
    )
    return y


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up. x: (…, gate and up), each of a size that is a multiple of 16."""
    x = x.contiguous()
    size = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], size)
    library().gptk_swiglu(
        x.dtype == torch.bfloat16, x.data_ptr(), y.data_ptr(), x.numel() // (2 * size), size
    )
    return y


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2. Has gradients, where these are on."""
    if torch.is_grad_enabled():
        y: Tensor = torch.ops.gptk.gelu(x)
        return y
    return gelu_or_gradient(x, None)


def gelu_or_gradient(x: Tensor, dy: Tensor | None) -> Tensor:
    """gelu(x); or, given its gradient dy, the gradient of x."""
    x = x.contiguous()
    if dy is not None:
        dy = dy.contiguous()
    y = torch.empty_like(x)
    library().gptk_gelu(
        *(x.dtype == torch.bfloat16, x.data_ptr(), None if dy is None else dy.data_ptr()),
        *(y.data_ptr(), x.numel()),
    )
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding, the halves of a head as pairs.

    x: (rows, time, heads, head_dim), head_dim a multiple of 32; cosines, sines: (1 or rows, time,
    heads, head_dim), the sines of the first half negative.
    """
    x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    library().gptk_rotate(
        *(x.dtype == torch.bfloat16, x.data_ptr(), cosines.data_ptr(), sines.data_ptr()),
        *(y.data_ptr(), x.numel() // size, cosines.numel() // size, size),
    )
    return y
