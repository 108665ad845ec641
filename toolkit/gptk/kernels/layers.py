"""Normalization, activations and rotary embeddings.

All tensors of a call are on the CPU and have one dtype, float32 or bfloat16.
"""

import torch
from torch import Tensor

from gptk.kernels.build import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis, whose size is a multiple of 16."""
    y: Tensor = library().rms_norm(x, weight, eps)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean x) / √(var x + eps) · weight, plus the bias, over the last axis."""
    y: Tensor = library().layer_norm(x, weight, bias, eps)
    return y


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up. x: (…, gate and up), each of a size that is a multiple of 16."""
    y: Tensor = library().swiglu(x)
    return y


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2. Has gradients, where these are on."""
    y: Tensor = torch.ops.gptk.gelu(x) if torch.is_grad_enabled() else library().gelu(x, None)
    return y


def gelu_or_gradient(x: Tensor, dy: Tensor | None) -> Tensor:
    """gelu(x); or, from its gradient dy, the gradient of x."""
    y: Tensor = library().gelu(x, dy)
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding, the halves of a head as pairs.

    x: (rows, time, heads, head_dim), head_dim a multiple of 32; cosines, sines: (1 or rows, time,
    heads, head_dim), the sines of the first half negative.
    """
    y: Tensor = library().rotate(x, cosines, sines)
    return y
