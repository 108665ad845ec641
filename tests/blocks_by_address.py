"""What gptk.kernels.triton_attention computes, by PyTorch in float64: the reference for its tests,
and what runs in its place in tests of the passes on a GPU that are run on a CPU."""

import ctypes

import torch
from torch import Tensor

from gptk.kernels import BLOCK
from gptk.kernels.gpu import Tiling


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
    """See gptk.kernels.triton_attention. Tokens of no tile get NaN, whose values nobody may use."""
    _, _, _, kv_heads, _, d = sample.shape
    y = torch.full((len(qkv), heads, d), float("nan"), dtype=qkv.dtype)
    blocks, addresses = tables.tolist(), slabs.tolist()
    # All are stored before any is read, as by two kernels, one after the other.
    for first, count, past, table in tiles.tolist():
        assert count <= tiling.tokens(heads // kv_heads)
        for token in range(count):
            keys, values = block_at(addresses, blocks[table + (past + token) // BLOCK], sample)
            slot = (past + token) % BLOCK
            keys[layer, :, :, slot] = qkv[first + token, heads : heads + kv_heads]
            values[layer, :, slot] = qkv[first + token, heads + kv_heads :]
    for first, count, past, table in tiles.tolist():
        if not count:
            continue
        end = past + count
        found = [block_at(addresses, b, sample) for b in blocks[table : table - (-end // BLOCK)]]
        keys = torch.cat([keys[layer] for keys, _ in found], dim=2)[:, :, :end].double()
        values = torch.cat([values[layer] for _, values in found], dim=1)[:, :end].double()
        group = heads // kv_heads
        keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
        q = qkv[first : first + count, :heads].double().transpose(0, 1)
        seen = torch.arange(end) <= torch.arange(past, end)[:, None]
        scores = (q @ keys / d**0.5).masked_fill(~seen, -torch.inf)
        y[first : first + count] = (scores.softmax(dim=-1) @ values).transpose(0, 1).to(y.dtype)
    return y


def block_at(addresses: list[int], block: int, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (layers, kv_heads, d, BLOCK) and values (layers, kv_heads, BLOCK, d) of a block."""
    layers, _, blocks, kv_heads, _, d = sample.shape
    size = sample.numel() * sample.dtype.itemsize
    memory = (ctypes.c_char * size).from_address(addresses[block // blocks])
    slab = torch.frombuffer(memory, dtype=sample.dtype).view(sample.shape)
    keys, values = slab[:, :, block % blocks].unbind(1)
    return keys.view(layers, kv_heads, d, BLOCK), values
