"""A linear layer that takes the fastest kernel there is for few rows on a CPU.

Decoding multiplies every weight with a row or a few, so its speed is that of reading the
weights. On the machine of docs/benchmarks.md, whose memory gives 31 GB/s, `F.linear` reads
SmolLM2's matrices at 10 GB/s in float32 and 13 in bfloat16 (MKL's matrix-vector product, and
oneDNN on weights in a layout that it does not like). gptk's own kernel reads either at 31, or 24
where they are not in huge pages. Where it cannot run, oneDNN itself reads float32 weights as they
are at 20 GB/s, and bfloat16 weights that were packed into its blocked layout once at 17 to 20.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptk import kernels
from gptk.model.levels import Precision
from gptk.model.quantization import Packed, quantized

_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)
_LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if _ONEDNN else None


class Direct(nn.Module):
    """A module whose call is its `forward` where nothing listens: in decoding that is 4 % less."""

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled() or self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*args)
        return self.forward(*args)


class Linear(Direct, nn.Linear):
    """nn.Linear with faster inference on CPUs; in training and elsewhere it is the same."""

    packed: Packed | None = None
    """The weights in another layout, in place of `weight`, until `unpack`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.linear(x, self.bias)
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            if _autocasts(x, self.weight):
                return kernels.autocast_linear(x, self.weight, self.bias)
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return _row(x, self.weight, self.bias)
        inputs = self.in_features
        if (
            x.numel() < inputs * kernels.FEW_ROWS.get(x.dtype, 0)
            and inputs % 32 == 0
            and self.weight.is_contiguous()
            and kernels.suit(x, self.weight)
        ):
            return kernels.dense(x, self.weight, self.bias)
        if _suits(self.weight, torch.float32):
            return _onednn(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Pack the weights if they are bfloat16 on a CPU that gptk's kernels don't suit.

        Meanwhile they cannot be trained.
        """
        if self.packed is None and _suits(self.weight, torch.bfloat16) and not kernels.available():
            self.take(Blocked(self.weight))

    def take(self, packed: Packed) -> None:
        """Compute with these weights from now on."""
        self.packed = packed
        del self.weight
        self.__dict__.pop("weight", None)  # where GPT.pack has put it, too

    def quantize(self, precision: Precision) -> None:
        """Round the weights to that precision, if they suit it; see gptk.quantization."""
        if self.packed is None and (packed := quantized(self.weight, precision)) is not None:
            self.take(packed)

    def unpack(self) -> None:
        """Make the weights an ordinary parameter again: what they were, or were rounded to."""
        if self.packed is not None:
            self.weight = nn.Parameter(self.packed.dense())
            self.packed = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.packed.dense()


class Blocked:
    """bfloat16 weights in oneDNN's blocked layout, bit for bit."""

    kind = "bfloat16"

    def __init__(self, weight: Tensor) -> None:
        self.nbytes = weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, self._weight, bias)

    def dense(self) -> Tensor:
        dense: Tensor = self._weight.to_dense()
        return dense


def _suits(weight: Tensor, dtype: torch.dtype) -> bool:
    return _ONEDNN and weight.dtype == dtype and weight.device.type == "cpu"


def _autocasts(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast to bfloat16 is on, and gptk's kernels do what it asks for sooner.

    Smaller weights stay in the caches, and what autocast makes of them costs little.
    """
    return (
        weight.numel() >= 2**19
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and kernels.suit_products(x, weight)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _LINEAR(x, weight, bias, "none", [], "")
    return y


def _row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product for a compiler: of one row, so that it reads the weights as they are, in order."""
    if x.shape[0] != 1 or x.dim() != 2 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    # Strided, so that what makes x is computed once, and not fused into every output.
    row = x.contiguous().as_strided((x.shape[1],), (1,))
    y = (weight.float() * row.float()).sum(dim=-1).to(x.dtype)[None]
    return y if bias is None else y + bias
