"""One pass over tokens of many rows, of any lengths, with their keys and values in blocks."""

from collections.abc import Collection, Sequence
from typing import TypeGuard

from torch import Tensor

from gptk import kernels
from gptk.kernels.gpu import can_attend, tiling
from gptk.model.gpt import GPT
from gptk.model.graphs import MOST_TOKENS, graphs_of
from gptk.model.joined import Numbers, Part, read_into_caches, tokens_and_slots
from gptk.model.pool import BlockPool, Sizes
from gptk.model.protocol import CausalModel
from gptk.model.transformers_model import TransformersModel
from gptk.model.walk import plan_of


def has_blocks(model: CausalModel) -> TypeGuard[GPT | TransformersModel]:
    """Whether a model's keys and values can be in blocks, so that `read_parts` can read with it."""
    return isinstance(model, GPT | TransformersModel)


def sizes_of(model: GPT | TransformersModel) -> Sizes:
    """What a block of a model's keys and values has room for."""
    return model.config if isinstance(model, GPT) else model.sizes


def read_parts(
    model: GPT | TransformersModel,
    parts: Sequence[Part],
    layers: Collection[int] = (),
    *,
    beyond: bool = False,
) -> Tensor:
    """Read the tokens of all parts in one pass; their caches hold them afterwards.

    beyond: take blocks beyond the pool's budget. Returns (wanted tokens of all parts, 1 + layers,
    width), see `GPT.states`. Raises OutOfBlocks, with nothing read.
    """

    def read(pool: BlockPool) -> Tensor:
        if not isinstance(model, GPT):
            return model.read_blocks(pool, parts, layers)
        config = model.config
        group = config.n_heads // config.n_kv_heads
        by_triton = can_attend(pool.device, pool.dtype, config.head_dim, group)
        on_gpu = by_triton and model.has_plain_attention
        return (_read_on_gpu if on_gpu else _read)(model, pool, parts, layers)

    return read_into_caches(parts, read, beyond=beyond)


def _read(model: GPT, pool: BlockPool, parts: Sequence[Part], layers: Collection[int]) -> Tensor:
    """The states that a pass is asked for, by gptk's kernels for CPUs or by PyTorch."""
    numbers = Numbers(parts)
    tokens, slots = tokens_and_slots(pool, numbers, model.config.n_heads)
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
    tokens, slots = tokens_and_slots(pool, numbers, heads, division)
    table = model.position_table(numbers.longest)
    return model.states_at(tokens, slots, table, layers)[0]
