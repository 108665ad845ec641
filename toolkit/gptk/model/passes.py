"""One pass over tokens of many rows, of any lengths, with their keys and values in blocks."""

import functools
import operator
from array import array
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gptk import kernels
from gptk.kernels.gpu import can_attend, tiling
from gptk.model.gpt import GPT
from gptk.model.graphs import MOST_TOKENS, graphs_of
from gptk.model.joined import JoinedSlots, Numbers, Part, as_tensor
from gptk.model.pool import BlockPool
from gptk.model.walk import plan_of


def read_parts(
    model: GPT, parts: Sequence[Part], layers: Collection[int] = (), *, beyond: bool = False
) -> Tensor:
    """Read the tokens of all parts in one pass; their caches hold them afterwards.

    beyond: take blocks beyond the pool's budget. Returns (wanted tokens of all parts, 1 + layers,
    width), see `GPT.states`. Raises OutOfBlocks, with nothing read.
    """
    pool = parts[0].cache.pool
    for part in parts:
        part.cache.prepare(part.row, len(part.tokens), beyond=beyond)
    config = model.config
    group = config.n_heads // config.n_kv_heads
    by_triton = can_attend(pool.device, pool.dtype, config.head_dim, group)
    if by_triton and model.has_plain_attention:
        states = _read_on_gpu(model, pool, parts, layers)
    else:
        states = _read(model, pool, parts, layers)
    for part in parts:
        part.cache.advance(part.row, part.tokens)
    return states


def _read(model: GPT, pool: BlockPool, parts: Sequence[Part], layers: Collection[int]) -> Tensor:
    """The states that a pass is asked for, by gptk's kernels for CPUs or by PyTorch."""
    numbers = Numbers(parts)
    all_wanted = len(numbers.wanted) == len(numbers.tokens)
    slots = JoinedSlots(
        *(pool, model.config.n_heads, as_tensor(numbers.positions)[None].to(pool.device)),
        None if all_wanted else as_tensor(numbers.wanted).to(pool.device),
        *(as_tensor(numbers.sequences).view(-1, 4), as_tensor(numbers.tables), pool.addresses),
    )
    tokens = as_tensor(numbers.tokens)[None].to(model.device)
    table = model.position_table(numbers.longest)
    if (plan := plan_of(model)) is not None and kernels.can_run(pool.sample, pool.sample):
        x = model.embeddings(tokens, slots.positions)[0]
        return slots.walk(plan, x, table, list(layers))
    return model.states_at(tokens, slots, table, layers)[0]


def _read_on_gpu(
    model: GPT, pool: BlockPool, parts: Sequence[Part], layers: Collection[int]
) -> Tensor:
    """The same on a GPU: as a CUDA graph if the tokens are few, else operation by operation."""
    heads, group = model.config.n_heads, model.config.n_heads // model.config.n_kv_heads
    count = sum(len(part.tokens) for part in parts)
    few = tiling(pool.dtype, few=True)
    division = few if count <= MOST_TOKENS else tiling(pool.dtype, few=False)
    numbers = Numbers(parts, division.tokens(group))
    if division is few:
        graphs = graphs_of(model, pool, few, numbers.longest)
        states = None if graphs is None else graphs.states(numbers, tuple(layers))
        if states is not None:
            return states
    tables = array("q", numbers.tables)
    each = [numbers.tokens, numbers.positions, numbers.sequences, tables, numbers.wanted]
    together = as_tensor(functools.reduce(operator.add, each)).to(pool.device)  # one copy
    tokens, positions, tiles, blocks, wanted = torch.split(together, list(map(len, each)))
    asked = None if len(wanted) == count else wanted
    where = tiles.view(-1, 4), blocks, pool.addresses
    slots = JoinedSlots(pool, heads, positions[None], asked, *where, division)
    table = model.position_table(numbers.longest)
    return model.states_at(tokens[None], slots, table, layers)[0]
