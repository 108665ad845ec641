"""Attention on a GPU over keys and values in blocks, by Triton. See gptk.model.blocks.

FlexAttention could do it, too. Triton is the simpler one here: FlexAttention takes all keys as one
tensor, while blocks are in slabs that come and go; it takes a mask made anew for each pass, and
TorchInductor's compilation of tens of seconds. This kernel follows the table of blocks of a row to
wherever they are, takes all numbers of a pass from tensors, so that it can be part of a CUDA graph,
and runs on CPUs in Triton's interpreter, where it is tested.

Queries are divided into tiles of a few tokens of a row, with all heads that share keys. Where
tiles are few, as in decoding, the keys of a row are divided between several programs, each of which
computes its part of the softmax (Flash-Decoding, Dao et al. 2023); a second kernel joins the parts.
The division depends on the row alone, so that a row's result does not depend on the others.
"""

# Triton's functions have no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.kernels.attention import BLOCK
from gptk.kernels.gpu import Tiling, power_of_two


def attend_blocks(
    qkv: Tensor,
    tiles: Tensor,
    tables: Tensor,
    slabs: Tensor,
    sample: Tensor,
    layer: int,
    heads: int,
    tiling: Tiling,
) -> Tensor:
    """softmax(q kᵀ / √d) v for sequences of any lengths, whose keys and values are in blocks.

    The new keys and values are stored in the blocks first. Each token sees those before it in its
    sequence, and itself.

    qkv: (tokens, heads + 2 · kv_heads, d), contiguous: queries, keys, values, of which `can_attend`
    is true. tiles: (n, 4) int64: a tile's first token in qkv, how many tokens it has, at most
    `tiling.tokens`, how many tokens of its sequence come before it, and where the blocks of the
    sequence begin in `tables`, the numbers of blocks, int64. slabs: the addresses of slabs of
    blocks, int64, multiples of 16; sample: one of them, (layers, 2, blocks, kv_heads, BLOCK, d),
    contiguous, with keys as (d, BLOCK) and values as (BLOCK, d). For the numbers in these the
    caller answers. Returns (tokens, heads, d); what it has for tokens of no tile has no meaning.
    """
    tokens, _, d = qkv.shape
    _, _, blocks, kv_heads, _, _ = sample.shape
    group = heads // kv_heads
    y = qkv.new_empty(tokens, heads, d)
    parts = tiling.parts
    sums = qkv.new_empty(tokens, heads, parts, d, dtype=torch.float32)
    tops, totals = qkv.new_empty(2, tokens, heads, parts, dtype=torch.float32)
    head = {"d": d, "d_padded": max(16, power_of_two(d))}
    sizes = head | {
        "kv_heads": kv_heads,
        "group": group,
        "slab_size": blocks,
        "block_size": BLOCK,
    }
    half = blocks * kv_heads * BLOCK * d
    keys_at, values_at = 2 * layer * half, (2 * layer + 1) * half
    # Triton launches on the current device.
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        _store[(len(tiles), kv_heads)](
            *(qkv, tiles, tables, slabs, keys_at, values_at), **sizes, tokens=tiling.tokens(group)
        )
        _attend[(len(tiles), kv_heads, parts)](
            *(qkv, tiles, tables, slabs, keys_at, values_at, d**-0.5, sums, tops, totals),
            **sizes,
            parts=parts,
            group_padded=power_of_two(group),
            queries=max(tiling.queries, power_of_two(group)),
            num_stages=1 if qkv.dtype == torch.float32 else 2,  # blocks of keys in shared memory
        )
        _join[(tokens, heads)](sums, tops, totals, y, **head, parts=parts)
    return y


@triton.jit
def _numbers(tile):
    """The four numbers of a tile."""
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def _slab_of(block, slabs, is_block, slab_size: tl.constexpr, kind: tl.constexpr):
    """A pointer to the slab of each block."""
    address = tl.load(slabs + block // slab_size, mask=is_block, other=0)
    return tl.multiple_of(address.to(tl.pointer_type(kind)), 16)


@triton.jit
def _store(
    qkv,
    tiles,
    tables,
    slabs,
    keys_at,
    values_at,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    tokens: tl.constexpr,
    slab_size: tl.constexpr,
    block_size: tl.constexpr,
    d: tl.constexpr,
    d_padded: tl.constexpr,
):
    """Store the new keys and values of a tile, of one key head."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first, count, past, table = _numbers(tiles + 4 * tile)
    token, dim = tl.arange(0, tokens), tl.arange(0, d_padded)
    is_token = token < count
    slot = (past + token) % block_size
    block = tl.load(tables + table + (past + token) // block_size, mask=is_token, other=0)
    slab = _slab_of(block, slabs, is_token, slab_size, qkv.dtype.element_ty)
    head = (block % slab_size * kv_heads + kv_head) * block_size * d
    exists = is_token[:, None] & (dim < d)[None, :]
    new = qkv + ((first + token) * (group + 2) * kv_heads + group * kv_heads + kv_head)[:, None] * d
    key = tl.load(new + dim[None, :], mask=exists)
    value = tl.load(new + kv_heads * d + dim[None, :], mask=exists)
    tl.store((slab + keys_at + head + slot)[:, None] + dim[None, :] * block_size, key, mask=exists)
    tl.store((slab + values_at + head + slot * d)[:, None] + dim[None, :], value, mask=exists)


@triton.jit
def _keys_and_values(keys, values, used, dim, d: tl.constexpr, block_size: tl.constexpr):
    """Keys (d, block_size) and values (block_size, d) of a block and a head, with zeros for values
    of slots from `used` on: these may hold anything, and 0 times NaN is not 0."""
    slot = tl.arange(0, block_size)
    is_dim = dim < d
    keys += dim[:, None] * block_size + slot[None, :]
    values += slot[:, None] * d + dim[None, :]
    is_value = (slot < used)[:, None] & is_dim[None, :]
    return (
        tl.load(keys, mask=is_dim[:, None], other=0.0),
        tl.load(values, mask=is_value, other=0.0),
    )


@triton.jit
def _attend(
    qkv,
    tiles,
    tables,
    slabs,
    keys_at,
    values_at,
    scale,
    sums,
    tops,
    totals,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    slab_size: tl.constexpr,
    block_size: tl.constexpr,
    d: tl.constexpr,
    d_padded: tl.constexpr,
    parts: tl.constexpr,
    group_padded: tl.constexpr,
    queries: tl.constexpr,
):
    """The queries of a tile that share a key head, over a part of the keys. Of each query: tops,
    the highest score; totals, Σ exp(score - top); sums, Σ exp(score - top) · value."""
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count, past, table = _numbers(tiles + 4 * tile)
    query, dim, slot = tl.arange(0, queries), tl.arange(0, d_padded), tl.arange(0, block_size)
    token, member = query // group_padded, query % group_padded
    is_query = (token < count) & (member < group)
    head = kv_head * group + member
    exists = is_query[:, None] & (dim < d)[None, :]
    rows = ((first + token) * (group + 2) * kv_heads + head)[:, None]
    q = tl.load(qkv + rows * d + dim[None, :], mask=exists, other=0.0)
    top = tl.full((queries,), float("-inf"), tl.float32)
    total = tl.zeros((queries,), tl.float32)
    y = tl.zeros((queries, d_padded), tl.float32)
    blocks = tl.cdiv(past + count, block_size)
    share = tl.cdiv(blocks, parts)
    for number in range(part * share, tl.minimum(blocks, (part + 1) * share)):
        block = tl.load(tables + table + number)
        slab = _slab_of(block, slabs, True, slab_size, qkv.dtype.element_ty)
        base = slab + (block % slab_size * kv_heads + kv_head) * block_size * d
        used = past + count - number * block_size
        keys, values = _keys_and_values(base + keys_at, base + values_at, used, dim, d, block_size)
        scores = tl.dot(q, keys, input_precision="ieee") * scale
        is_seen = number * block_size + slot[None, :] <= (past + token)[:, None]
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen no key yet
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(top - shift)
        total = total * decay + tl.sum(weights, 1)
        y *= decay[:, None]
        y += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = higher
    place = ((first + token) * kv_heads * group + head) * parts + part
    tl.store(tops + place, top, mask=is_query)
    tl.store(totals + place, total, mask=is_query)
    tl.store(sums + place[:, None] * d + dim[None, :], y, mask=exists)


@triton.jit
def _join(
    sums,
    tops,
    totals,
    y,
    d: tl.constexpr,
    d_padded: tl.constexpr,
    parts: tl.constexpr,
):
    """The result for a token and head, from those of all parts of the keys."""
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    part, dim = tl.arange(0, parts), tl.arange(0, d_padded)
    tops_of_parts = tl.load(tops + head * parts + part)
    weights = tl.exp(tops_of_parts - tl.max(tops_of_parts, 0))
    total = tl.sum(weights * tl.load(totals + head * parts + part), 0)
    is_dim = (dim < d)[None, :]
    each = tl.load(sums + (head * parts + part)[:, None] * d + dim[None, :], mask=is_dim, other=0.0)
    joined = tl.sum(weights[:, None] * each, 0) / total
    tl.store(y + head * d + dim, joined.to(y.dtype.element_ty), mask=dim < d)
