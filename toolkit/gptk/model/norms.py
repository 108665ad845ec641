"""Normalization over the last axis."""

import torch
from torch import Tensor, nn

from gptk import kernels
from gptk.model.config import GPTConfig
from gptk.model.linear import HooklessModule


class RMSNorm(HooklessModule, nn.RMSNorm):
    """nn.RMSNorm (Zhang and Sennrich 2019). PyTorch runs eight small kernels for it in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 16 == 0 and kernels.can_run(x, self.weight):
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return kernels.rms_norm(x, self.weight, eps)
        return super().forward(x)


class LayerNorm(HooklessModule, nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016), in inference by gptk's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if kernels.can_run(x, self.weight):
            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class Identity(HooklessModule, nn.Identity):
    """In the place of a norm that a model does not have."""


def make_norm(config: GPTConfig, size: int, *, exists: bool = True) -> nn.Module:
    """Layer norm or RMS norm over the last axis, if there is one."""
    if not exists:
        return Identity()
    if config.norm == "rms":
        return RMSNorm(size, eps=config.norm_eps)
    return LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)
