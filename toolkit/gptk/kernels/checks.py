"""Whether the kernels can be run, and whether they should be."""

import functools
from typing import Any

import torch
from torch import Tensor

from gptk.kernels import operators
from gptk.kernels.attention import HEAD_DIMS
from gptk.kernels.build import load

enabled = True
"""False has PyTorch's operations used everywhere, as on a machine that cannot run the kernels."""


def available() -> bool:
    """Whether this machine can run the kernels; the first call compiles them, in a few seconds."""
    return enabled and reason_against() is None


def reason_against() -> str | None:
    """Why this machine cannot run the kernels, or None. Defines PyTorch's operators for them."""
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    operators.define()
    return None


def suit(x: Tensor, other: Tensor) -> bool:
    """Whether they can be run on x, for a result that needs no gradient.

    other: what has to be of x's dtype.
    """
    dtype = x.dtype
    return (
        (dtype == torch.bfloat16 or dtype == torch.float32)
        and dtype == other.dtype
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and available()
    )


def suit_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_causally` should be run. Under a compiler only once `available` was asked.

    Not for gradients in float32: there a step is the book's to the last digits that AdamW leaves,
    with PyTorch's operations a little closer than with ours.
    """
    dtype = q.dtype
    alone = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return (
        (dtype == torch.bfloat16 or (dtype == torch.float32 and alone))
        and dtype == k.dtype == v.dtype
        and q.is_cpu
        and q.shape[3] in HEAD_DIMS
        and (operators.defined() if torch.compiler.is_compiling() else available())
    )


def suit_products(*given: Tensor) -> bool:
    """Whether `product` can be run on these, and is the fastest there is: on processors with
    AVX512-BF16 that have no AMX. Under a compiler only once `available` was asked.
    """
    return (
        all(x.is_cpu and x.dtype in (torch.bfloat16, torch.float32) for x in given)
        and _multiplies_bfloat16()
        and (operators.defined() if torch.compiler.is_compiling() else available())
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16")) and not has.get("amx_bf16") and not has.get("amx_tile")


def suit_cross_entropy(logits: Tensor) -> bool:
    """Whether `cross_entropy` can be run."""
    return logits.is_cpu and logits.dtype in (torch.bfloat16, torch.float32) and available()


def suit_gelu(x: Tensor) -> bool:
    """Whether `gelu` should be run; a compiler makes as good a one of PyTorch's.

    For float32 see `suit_causal_attention`.
    """
    alone = not torch.is_grad_enabled()
    return (
        x.is_cpu
        and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and alone))
        and not torch.compiler.is_compiling()
        and available()
    )


def shims() -> dict[Any, list[str]]:
    """For AOTInductor: how its programs call them without PyTorch's dispatcher between."""
    if not available():
        return {}
    function = (
        "AOTITorchError aoti_torch_cpu_few_rows_linear(AtenTensorHandle x, "
        "AtenTensorHandle weights, int64_t bits, int64_t outputs, AtenTensorHandle* y)"
    )
    return {torch.ops.gptk.few_rows_linear.default: [function]}
