"""Rotary position embedding (Su et al. 2021): tables of cosines and sines, and rotation."""

import torch
from torch import Tensor

from gptk import kernels
from gptk.model.config import GPTConfig


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding, halves of a head as pairs.

    x: (rows, time, heads, head_dim); cosines, sines: (1 or rows, time, heads, head_dim).
    """
    if x.shape[-1] % 32 == 0 and kernels.can_run(x, cosines):
        return kernels.rotate(x, cosines, sines)
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, dims=-1), sines)


def rotary_tables(config: GPTConfig, length: int, device: torch.device) -> Tensor:
    """(ropes, 2, length, head_dim) float32: cosines, and sines with `rotate`'s sign.

    Computed in float32 whatever the model's dtype, as angles grow large.
    """
    half, rotated = config.head_dim // 2, (config.rotary_dim or config.head_dim) // 2
    exponents = torch.arange(rotated, device=device, dtype=torch.float32) / rotated
    positions = torch.arange(length, device=device, dtype=torch.float32)
    tables = []
    for rope, theta in enumerate((config.rope_theta, config.window_rope_theta)[: config.ropes]):
        assert theta is not None
        frequencies, scale = 1.0 / theta**exponents, 1.0
        if rope == 0:
            scale = config.rope_scale
            if config.rope_factors is not None:
                frequencies /= torch.tensor(config.rope_factors, device=device)
        angles = torch.outer(positions, frequencies)
        # Numbers that are not rotated have an angle of 0, and no scale.
        cos = torch.ones(length, half, device=device)
        sin = torch.zeros(length, half, device=device)
        cos[:, :rotated], sin[:, :rotated] = scale * angles.cos(), scale * angles.sin()
        tables.append(torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))))
    return torch.stack(tables)
