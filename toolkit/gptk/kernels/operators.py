"""gptk's kernels as operators of PyTorch: what its autograd and its compilers are told of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptk.kernels import attention, layers, products

_SCHEMAS = {
    "few_rows_linear": "(Tensor x, Tensor weights, int bits, int outputs) -> Tensor",
    "product": "(Tensor a, Tensor b, Tensor? bias, bool single) -> Tensor",
    "column_sums": "(Tensor x) -> Tensor",
    "gelu": "(Tensor x) -> Tensor",
    "gelu_backward": "(Tensor x, Tensor dy) -> Tensor",
    "causal_attention": "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
    "causal_attention_backward": (
        "(Tensor q, Tensor k, Tensor v, Tensor y, Tensor logsums, Tensor dy) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
_ON_CPU: dict[str, Callable[..., Any]] = {
    "few_rows_linear": lambda x, weights, bits, outputs: products.few_rows_linear(
        x, weights, None, bits, outputs
    ),
    "product": products.new_product,
    "column_sums": products.column_sums,
    "gelu": lambda x: layers.gelu_or_gradient(x, None),
    "gelu_backward": layers.gelu_or_gradient,
    "causal_attention": attention.causal_attention,
    "causal_attention_backward": attention.causal_attention_backward,
}
_libraries: list[object] = []
"""Kept, as an operator goes with its library."""


def defined() -> bool:
    """Whether there are any. A compiler may not define them on the way."""
    return bool(_libraries)


def define() -> None:
    """Make the operators of `torch.ops.gptk`, once a process; the kernels must be loaded.

    Their derivatives are here. Those of attention and GELU have no derivatives themselves, as
    with PyTorch's own attention.
    """
    if _libraries:
        return
    library: Any = torch.library.Library("gptk", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, _ON_CPU[name], "CPU")
        torch.library.register_fake(f"gptk::{name}", _SHAPES[name], lib=library)
    for name, (setup, backward) in _DERIVATIVES.items():
        torch.library.register_autograd(f"gptk::{name}", backward, setup_context=setup, lib=library)
    _libraries.append(library)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_SHAPES: dict[str, Callable[..., Any]] = {
    "few_rows_linear": lambda x, weights, bits, outputs: x.new_empty(x.shape[0], outputs),
    "product": lambda a, b, bias, single: a.new_empty(
        a.shape[0], b.shape[1], dtype=torch.float32 if single else torch.bfloat16
    ),
    "column_sums": lambda x: x.new_empty(x.shape[1], dtype=torch.float32),
    "gelu": _like,
    "gelu_backward": lambda x, dy: _like(x),
    "causal_attention": lambda q, k, v: (
        _like(q),
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32),
    ),
    "causal_attention_backward": lambda q, k, v, *rest: (_like(q), _like(k), _like(v)),
}


def _keep_sides(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _product_backward(ctx: Any, dy: Tensor) -> Any:
    (a, b), needed = ctx.saved_tensors, ctx.needs_input_grad
    dy, product = dy.to(torch.bfloat16), torch.ops.gptk.product
    return (
        product(dy, b.t(), None, False) if needed[0] else None,
        product(dy.t(), a, None, b.dtype == torch.float32).t() if needed[1] else None,
        torch.ops.gptk.column_sums(dy) if needed[2] else None,
        None,
    )


def _keep_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.gptk.gelu_backward(*ctx.saved_tensors, dy)


def _keep_all(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _causal_attention_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    return torch.ops.gptk.causal_attention_backward(*ctx.saved_tensors, dy)


def _not_again(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("gptk's attention and GELU have no second derivatives")


_DERIVATIVES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "product": (_keep_sides, _product_backward),
    "gelu": (_keep_inputs, _gelu_backward),
    "gelu_backward": (_keep_inputs, _not_again),
    "causal_attention": (_keep_all, _causal_attention_backward),
    "causal_attention_backward": (_keep_inputs, _not_again),
}
