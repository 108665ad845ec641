"""Attention over a KV cache, and causal attention among the tokens of a prompt, with gradients.

All tensors are on the CPU. All functions raise ValueError for other arguments than they document.
"""

import torch
from torch import Tensor

from gptk.kernels.arguments import BFLOAT16, FLOAT32, INT32, INT64, are, are_floats, fail, refuse
from gptk.kernels.build import library
from gptk.kernels.compiler import FEW_QUERIES

HEAD_DIMS = (32, 64, 96, 128)
"""The head sizes that there are kernels for."""
BLOCK = 64
"""Tokens of a block of `attend_blocks`; it is CHUNK in cpp/attention.h."""


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, trees: int) -> Tensor:
    """softmax(q kᵀ / √d + mask) v for few queries over a KV cache.

    q: (query tokens, heads, d), the tokens of a tree adjacent, each token contiguous; keys, values:
    (trees · kv_heads, 1, length, d), with equal strides, each head contiguous; mask: (1 or trees,
    query tokens of a tree, length), for all heads, each row contiguous. d: one of HEAD_DIMS; all of
    one dtype, float32 or bfloat16. A key head has at most FEW_QUERIES queries in a tree. Returns
    (query tokens, heads, d), in q's dtype.
    """
    tokens, heads, d = q.shape
    batch, _, length, _ = keys.shape
    kv_heads = batch // trees if trees > 0 else 0
    rows = tokens // trees if trees > 0 else 0
    if (
        kv_heads < 1
        or (rows * trees, kv_heads * trees) != (tokens, batch)
        or heads % kv_heads
        or heads // kv_heads * rows > FEW_QUERIES
        or d not in HEAD_DIMS
        or q.stride()[1:] != (d, 1)
        or keys.shape != (batch, 1, length, d)
        or values.shape != keys.shape
        or keys.stride()[2:] != (d, 1)
        or values.stride() != keys.stride()
        or not are_floats(q, keys, values)
    ):
        refuse("attend", q=q, keys=keys, values=values, trees=trees)
    mask_address = None
    tree_stride = mask_stride = 0
    if mask is not None:
        mask_address = mask.data_ptr()
        if (
            mask.shape[-2:] != (rows, length)
            or mask.dim() != 3
            or len(mask) not in (1, trees)
            or (mask.stride(2) != 1 and length > 1)
            or not are(q.dtype, mask)
        ):
            refuse("attend", q=q, keys=keys, mask=mask, trees=trees)
        tree_stride, mask_stride = mask.stride(0) if len(mask) > 1 else 0, mask.stride(1)
    y = q.new_empty(tokens, heads, d)
    if status := library().gptk_attend(
        *(q.dtype is BFLOAT16, q.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(mask_address, y.data_ptr(), d**-0.5),
        *(trees, rows, heads, kv_heads, length, d),
        *(q.stride(0), keys.stride(0), tree_stride, mask_stride),
    ):
        fail(status)
    return y


def attend_blocks(
    qkv: Tensor,
    sequences: Tensor,
    tables: Tensor,
    slabs: Tensor,
    sample: Tensor,
    layer: int,
    heads: int,
) -> Tensor:
    """softmax(q kᵀ / √d) v for sequences of any lengths, whose keys and values are in blocks.

    The new keys and values are stored in the blocks first. Each token sees those before it in its
    sequence, and itself.

    qkv: (tokens, heads + 2 · kv_heads, d), contiguous: queries, keys, values. sequences: (n, 4)
    int64: a sequence's first token in qkv, how many it has there, how many its blocks hold already,
    and where its blocks begin in `tables`, int32 numbers of blocks. For the numbers in these two
    the caller answers. slabs: the addresses of slabs of blocks, int64; sample: one of them,
    (layers, 2, blocks, kv_heads, BLOCK, d), contiguous, blocks a power of two. Returns (tokens,
    heads, d).
    """
    tokens, all_heads, d = qkv.shape
    layers, _, blocks, kv_heads, block, _ = sample.shape
    if (
        all_heads != heads + 2 * kv_heads
        or kv_heads < 1
        or heads % kv_heads
        or heads // kv_heads > FEW_QUERIES
        or d not in HEAD_DIMS
        or not 0 <= layer < layers
        or sample.shape != (layers, 2, blocks, kv_heads, BLOCK, d)
        or blocks & (blocks - 1)
        or not (qkv.is_contiguous() and sample.is_contiguous())
        or not are_floats(qkv, sample)
        or not are(INT64, sequences, slabs)
        or not are(INT32, tables)
        or sequences.shape[1:] != (4,)
    ):
        refuse("attend_blocks", qkv=qkv, sequences=sequences, slab=sample, layer=layer, heads=heads)
    y = qkv.new_empty(tokens, heads, d)
    half = blocks * kv_heads * block * d
    if status := library().gptk_attend_blocks(
        *(qkv.dtype is BFLOAT16, qkv.data_ptr(), y.data_ptr(), sequences.data_ptr()),
        *(tables.data_ptr(), slabs.data_ptr()),
        *(tokens, len(sequences), heads, kv_heads, d, blocks.bit_length() - 1),
        *(2 * layer * half, (2 * layer + 1) * half),
    ):
        fail(status)
    return y


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v where each token sees itself and those before it.

    q: (rows, time, heads, d); k, v: (rows, time, kv_heads, d). d: one of HEAD_DIMS. Returns (rows,
    time, heads, d), in q's dtype. Has gradients, where these are on, in bfloat16.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y: Tensor = torch.ops.gptk.causal_attention(q, k, v)[0]
        return y
    return _attend_causally(q, k, v, None)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, logsums: Tensor | None) -> Tensor:
    """logsums: where log Σ exp of each query's scores goes, (rows, heads, time), or None."""
    q, k, v = _with_fitting_strides(q, k, v)
    y = q.new_empty(q.shape)
    if status := library().gptk_attend_causally(
        *(q.dtype is BFLOAT16, q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()),
        *(None if logsums is None else logsums.data_ptr(), *_causal_arguments(q, k)),
    ):
        fail(status)
    return y


def _with_fitting_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make each token contiguous, and the strides of k and v equal; copy where needed.

    Raises ValueError if shapes or dtypes do not fit.
    """
    if (
        not q.dim() == k.dim() == v.dim() == 4
        or k.shape != v.shape
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
        or q.shape[3] not in HEAD_DIMS
        or not k.shape[2]
        or q.shape[2] % k.shape[2]
        or not are_floats(q, k, v)
    ):
        refuse("attend_causally", q=q, k=k, v=v)
    q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    return (q, k, v) if k.stride() == v.stride() else (q, k.contiguous(), v.contiguous())


def _causal_arguments(q: Tensor, k: Tensor) -> tuple[float, *tuple[int, ...]]:
    """The scale, the sizes and the strides of q and k, as the kernels of C++ take them."""
    rows, time, heads, d = q.shape
    return (d**-0.5, rows, time, heads, k.shape[2], d, *q.stride()[:2], *k.stride()[:2])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and log Σ exp of each query's scores: (rows, heads, time) float32."""
    logsums = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return _attend_causally(q, k, v, logsums), logsums


def causal_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsums: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from dy, with y and logsums as `causal_attention` gave them."""
    q, k, v = _with_fitting_strides(q, k, v)
    y, logsums, dy = y.contiguous(), logsums.contiguous(), dy.contiguous()
    rows, time, heads, _ = q.shape
    if (
        not are(BFLOAT16, q, y, dy)  # see should_run_causal_attention
        or not y.shape == dy.shape == q.shape
        or logsums.shape != (rows, heads, time)
        or not are(FLOAT32, logsums)
    ):
        refuse("causal_attention_backward", q=q, y=y, logsums=logsums, dy=dy)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if status := library().gptk_attend_causally_backward(
        *(x.data_ptr() for x in (q, k, v, y, dy, logsums, dq, dk, dv)), *_causal_arguments(q, k)
    ):
        fail(status)
    return dq, dk, dv
