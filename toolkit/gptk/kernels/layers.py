"""Normalization, activations and rotary embeddings."""

import torch
from torch import Tensor

from gptk.kernels.build import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis, of a size that 16 divides."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    library().gptk_rms_norm(
        *(x.dtype == torch.bfloat16, x.data_ptr(), weight.data_ptr(), eps, y.data_ptr()),
        *(x.numel() // size, size),
    )
    return y


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up. x: (…, gate and up), each of a size that 16 divides."""
    x = x.contiguous()
    size = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], size)
    library().gptk_swiglu(
        x.dtype == torch.bfloat16, x.data_ptr(), y.data_ptr(), x.numel() // (2 * size), size
    )
    return y


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, as GPT-2 has it, with gradients where they are on."""
    if torch.is_grad_enabled():
        y: Tensor = torch.ops.gptk.gelu(x)
        return y
    return gelu_or_gradient(x, None)


def gelu_or_gradient(x: Tensor, dy: Tensor | None) -> Tensor:
    """GELU of x or, with dy, the gradient of x that belongs to it."""
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
    """gptk.model.rotate, for heads of a size that 32 divides."""
    x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    library().gptk_rotate(
        *(x.dtype == torch.bfloat16, x.data_ptr(), cosines.data_ptr(), sines.data_ptr()),
        *(y.data_ptr(), x.numel() // size, cosines.numel() // size, size),
    )
    return y
