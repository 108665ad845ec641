"""A linear layer that takes the fastest kernel there is for inference on a CPU.

Decoding multiplies every weight with one row or a few, so its speed is that of reading the weights,
at which PyTorch's products are far behind: `F.linear` reads SmolLM2's matrices at a third of what
the memory gives in float32 (MKL's matrix-vector product), and at 40 % of it in bfloat16 (oneDNN, on
weights that are not in its layout). gptk's kernel reads them at the memory's speed. On machines
that cannot run it, oneDNN reads float32 weights as they are at two thirds of it, and bfloat16
weights, once packed into its blocked layout, at 55 to 65 %.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptk import kernels
from gptk.model.packing import PackableModule
from gptk.model.panels import Panels, can_be_panels
from gptk.model.quantization import quantized
from gptk.model.rounding import Precision, outputs_at_a_time
from gptk.system.devices import has_fast_products

_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)
_LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if _ONEDNN else None
_MANY_ROWS = 4
"""From this many rows on, converting weights to float32 takes less time than it saves."""


class HooklessModule(nn.Module):
    """Calls `forward` directly in inference without hooks, which saves 4 % of a decoding step."""

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled() or self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*args)
        return self.forward(*args)


class Linear(HooklessModule, PackableModule, nn.Linear):
    """nn.Linear with faster inference on CPUs, and with weights that may be packed or quantized."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        if packed is not None and "weight" not in self._parameters:  # without a call: `in_use`
            if x.requires_grad and torch.is_grad_enabled():
                return F.linear(x, packed.dense(x.dtype), self.bias)
            return packed.linear(x, self.bias)
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()  # for training
        ):
            if _should_run_autocast_linear(x, self.weight):
                return kernels.autocast_linear(x, self.weight, self.bias)
            return F.linear(x, self.weight, self.bias)
        inputs = self.in_features
        if (inputs % 2 == 0 or x.dtype is torch.float32) and kernels.can_run(x, self.weight):
            return kernels.linear(x, self.weight, self.bias)
        if _onednn_takes(self.weight, torch.float32):
            return _onednn(x, self.weight, self.bias)
        if x.is_cpu and not has_fast_products(x.dtype) and x.numel() >= inputs * _MANY_ROWS:
            return _linear_in_float32(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def is_plain(self, x: Tensor) -> bool:
        """Whether nothing but the product with its packed weights, in x's dtype, makes its result:
        no gradients, hooks or bias."""
        return not (
            torch.is_grad_enabled()
            or self._forward_hooks
            or self._forward_pre_hooks
            or "forward" in self.__dict__
            or self.in_use is None
            or self.bias is not None
            or x.dtype is not self._packed_dtype
        )

    def pack(self) -> None:
        """Pack the weights, on a CPU: in panels for gptk's kernels, or, where these cannot run, for
        oneDNN if they are bfloat16.

        Packed weights cannot be trained.
        """
        if self.packed is not None:
            return
        weight = self.weight
        if can_be_panels(weight.shape, weight.dtype, weight.device):
            self.use_packed(Panels(weight, weight.dtype), weight.dtype)
        elif _onednn_takes(weight, torch.bfloat16) and has_fast_products(torch.bfloat16):
            self.use_packed(OneDNNPacked(weight), torch.bfloat16)

    def quantize(self, precision: Precision) -> None:
        """Round the weights to a precision, if `gptk.model.quantization.quantized` can.

        Weights that have this precision already, as in a GGUF file, stay as they are.
        """
        if self.packed is not None and self.packed.kind == precision:
            return
        weight = self.weight if self.packed is None else self.packed.dense(torch.float32)
        if (packed := quantized(weight, precision)) is not None:
            self.use_packed(packed, self.dtype)


class OneDNNPacked:
    """bfloat16 weights in oneDNN's blocked layout. No value is changed."""

    kind = "bfloat16"

    def __init__(self, weight: Tensor) -> None:
        self.nbytes = weight.nbytes
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def __deepcopy__(self, memo: object) -> "OneDNNPacked":
        return self  # never changed, and PyTorch cannot copy it

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, self._weight, bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        dense: Tensor = self._weight.to_dense()
        return dense.to(dtype)

    @property
    def device(self) -> torch.device:
        return self._weight.device


def _onednn_takes(weight: Tensor, dtype: torch.dtype) -> bool:
    return _ONEDNN and weight.dtype == dtype and weight.device.type == "cpu"


def _should_run_autocast_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast to bfloat16 is on, and gptk's kernel is then faster than PyTorch.

    It is not for small weights: the bfloat16 copies that autocast makes stay in the CPU's caches.
    """
    return (
        weight.numel() >= 2**19
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and kernels.should_run_product(x, weight)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _LINEAR(x, weight, bias, "none", [], "")
    return y


def _linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with products in float32, a part of the outputs at a time.

    For many rows, on a CPU without instructions for the dtype, where F.linear is four to ten times
    as slow.
    """
    y, inputs = x.new_empty(*x.shape[:-1], len(weight)), x.float()
    for outputs, part in outputs_at_a_time(weight):
        y[..., outputs] = F.linear(inputs, part)
    return y if bias is None else y.add_(bias)
