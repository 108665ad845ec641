"""Attention over a KV cache, and causal attention among the tokens of a prompt, with gradients.

All tensors are on the CPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptk.kernels.build import library
from gptk.kernels.structures import STRUCTURES, Slabs

HEAD_DIMS = (32, 64, 96, 128, 256)
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
    y: Tensor = library().attend(q, keys, values, mask, trees)
    return y


def attend_blocks(
    qkv: Tensor,
    sequences: Tensor,
    tables: Tensor,
    slabs: Slabs,
    layer: int,
    heads: int,
    window: int = 0,
) -> Tensor:
    """softmax(q kᵀ / √d) v for sequences of any lengths, whose keys and values are in blocks.

    The new keys and values are stored in the blocks first. Each token sees those before it in its
    sequence, and itself; with a window only so many of them, the last ones.

    qkv: (tokens, heads + 2 · kv_heads, d): queries, keys, values. sequences: (n, 4) int64: a
    sequence's first token in qkv, how many it has there, how many its blocks hold already, and
    where its blocks begin in `tables`, int32 numbers of blocks; each token is in one sequence, and
    the blocks that a sequence writes to are in no other. slabs: see `slabs_of`. Returns (tokens,
    heads, d).
    """
    y: Tensor = library().attend_blocks(qkv, sequences, tables, slabs, layer, heads, window)
    return y


def slabs_of(slabs: Sequence[Tensor | None]) -> Slabs:
    """Slabs of blocks for `attend_blocks`. Who has it made keeps the tensors alive.

    slabs: (layers, 2, blocks, kv_heads, BLOCK, d) each, contiguous, of one shape and dtype, blocks
    a power of two; None for those given back.
    """
    made = [None if slab is None else STRUCTURES.slab(slab) for slab in slabs]
    kinds = {numbers[1:] for numbers in made if numbers is not None}
    if len(kinds) != 1:
        raise ValueError(f"gptk.kernels.slabs_of cannot take slabs of {len(kinds)} kinds")
    addresses = [0 if numbers is None else numbers[0] for numbers in made]
    result = Slabs(torch.tensor(addresses, dtype=torch.int64, device="cpu"), *kinds.pop())
    if result.regions.overlap:
        raise ValueError("gptk.kernels.slabs_of cannot take slabs that share memory")
    return result


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
    y: Tensor = library().attend_causally(*_with_fitting_strides(q, k, v), logsums)
    return y


def _with_fitting_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make each token contiguous, and the strides of k and v equal; copy where needed."""
    if not k.numel():  # what has no numbers is contiguous with any strides, for PyTorch
        k, v = k.new_empty(k.shape), v.new_empty(v.shape)
    q = q if q.numel() else q.new_empty(q.shape)
    q, k, v = (x if x.stride()[2:] == (x.shape[-1], 1) else x.contiguous() for x in (q, k, v))
    return (q, k, v) if k.stride() == v.stride() else (q, k.contiguous(), v.contiguous())


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and log Σ exp of each query's scores: (rows, heads, time) float32."""
    logsums = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return _attend_causally(q, k, v, logsums), logsums


def causal_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsums: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from dy, with y and logsums as `causal_attention` gave them.

    All but logsums are bfloat16.
    """
    gradients: tuple[Tensor, Tensor, Tensor] = library().attend_causally_backward(
        *_with_fitting_strides(q, k, v), y, dy, logsums
    )
    return gradients
