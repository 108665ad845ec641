"""gptk's kernels as operators of PyTorch, `torch.ops.gptk`, for its autograd and for torch.compile.

An operator has a schema, an implementation on the CPU, the shapes of its results, and derivatives.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptk.kernels import attention, layers, products

_SCHEMAS = {
    "product": "(Tensor a, Tensor b, Tensor? bias, bool in_float32) -> Tensor",
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
    "product": products.new_product,
    "column_sums": products.column_sums,
    "gelu": lambda x: layers.gelu_or_gradient(x, None),
    "gelu_backward": layers.gelu_or_gradient,
    "causal_attention": attention.causal_attention,
    "causal_attention_backward": attention.causal_attention_backward,
}
_libraries: list[object] = []
"""The torch.library.Library of the operators, once defined; freeing it would remove them."""
_lock = threading.Lock()


def defined() -> bool:
    """Whether the operators are defined. While a compiler traces, they cannot be."""
    return bool(_libraries)


def define() -> None:
    """Define the operators, once a process. The kernels must be loaded.

    Attention and GELU have first derivatives only, as PyTorch's own attention has.
    """
    if _libraries:
        return
    with _lock:  # another thread may be defining them
        if not _libraries:
            _libraries.append(_define())


def _define() -> object:
    library: Any = torch.library.Library("gptk", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, _ON_CPU[name], "CPU")
        torch.library.register_fake(f"gptk::{name}", _SHAPES[name], lib=library)
    for name, (setup, backward) in _DERIVATIVES.items():
        torch.library.register_autograd(f"gptk::{name}", backward, setup_context=setup, lib=library)
    return library


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_SHAPES: dict[str, Callable[..., Any]] = {
    "product": lambda a, b, bias, in_float32: a.new_empty(
        a.shape[0], b.shape[1], dtype=torch.float32 if in_float32 else torch.bfloat16
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


def _save_operands(ctx: Any, inputs: Any, output: Any) -> None:
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


def _save_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.gptk.gelu_backward(*ctx.saved_tensors, dy)


def _save_all(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _causal_attention_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    return torch.ops.gptk.causal_attention_backward(*ctx.saved_tensors, dy)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("gptk's attention and GELU have no second derivatives")


_DERIVATIVES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "product": (_save_operands, _product_backward),
    "gelu": (_save_inputs, _gelu_backward),
    "gelu_backward": (_save_inputs, _no_second_derivative),
    "causal_attention": (_save_all, _causal_attention_backward),
    "causal_attention_backward": (_save_inputs, _no_second_derivative),
}
