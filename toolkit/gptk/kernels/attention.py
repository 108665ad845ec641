"""Attention: over a cache, and of a prompt with itself."""

import torch
from torch import Tensor

from gptk.kernels.build import library


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, trees: int) -> Tensor:
    """softmax(q kᵀ / √d + mask) v for few queries: (rows, heads, d), as q is.

    q: (rows, heads, d), the rows of a tree next to each other, and heads without gaps; keys and
    values: (trees · kv_heads, 1, length, d), of one layout, the keys of a head without gaps; mask:
    (1 or trees, rows of a tree, length), for all heads. d: one of HEAD_DIMS.
    """
    rows, heads, d = q.shape
    y = q.new_empty(rows, heads, d)
    tree_stride = mask_stride = 0
    if mask is not None:
        tree_stride, mask_stride = mask.stride(0) if len(mask) > 1 else 0, mask.stride(1)
    batch, _, length, _ = keys.shape
    library().gptk_attend(
        *(q.dtype == torch.bfloat16, q.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(None if mask is None else mask.data_ptr(), y.data_ptr(), d**-0.5),
        *(trees, rows // trees, heads, batch // trees, length, d),
        *(q.stride(0), keys.stride(0), tree_stride, mask_stride),
    )
    return y


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gptk.model.attend_causally, as (rows, time, heads, d). d: one of HEAD_DIMS.

    With gradients in bfloat16, where they are on.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y: Tensor = torch.ops.gptk.causal_attention(q, k, v)[0]
        return y
    return _attend_causally(q, k, v, None)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, logsums: Tensor | None) -> Tensor:
    q, k, v = _strided(q, k, v)
    rows, time, heads, d = q.shape
    y = q.new_empty(rows, time, heads, d)
    library().gptk_attend_causally(
        *(q.dtype == torch.bfloat16, q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()),
        *(None if logsums is None else logsums.data_ptr(), *_causal(q, k)),
    )
    return y


def _strided(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without gaps between heads, and keys and values with the same strides."""
    q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    return (q, k, v) if k.stride() == v.stride() else (q, k.contiguous(), v.contiguous())


def _causal(q: Tensor, k: Tensor) -> tuple[float, *tuple[int, ...]]:
    rows, time, heads, d = q.shape
    return (d**-0.5, rows, time, heads, k.shape[2], d, *q.stride()[:2], *k.stride()[:2])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and log Σ exp of each query's scores: (rows, heads, time)."""
    logsums = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return _attend_causally(q, k, v, logsums), logsums


def causal_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsums: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from dy, with y and the sums that `causal_attention` gave."""
    assert q.dtype == torch.bfloat16, "see suit_causal_attention"
    q, k, v = _strided(q, k, v)
    y, logsums, dy = y.contiguous(), logsums.contiguous(), dy.contiguous()
    made = [x.new_empty(x.shape) for x in (q, k, v)]
    library().gptk_attend_causally_backward(
        *(x.data_ptr() for x in (q, k, v, y, dy, logsums, *made)), *_causal(q, k)
    )
    return made[0], made[1], made[2]


HEAD_DIMS = (32, 64, 96, 128)
FEW_QUERIES = 16
"""From there on PyTorch's attention is faster, which takes queries together."""
