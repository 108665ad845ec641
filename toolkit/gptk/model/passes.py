"""One pass over tokens of many rows, of any lengths, with their keys and values in blocks."""

from array import array
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.kernels import BLOCK
from gptk.kernels.walk import walk
from gptk.model.blocks import BlockCache
from gptk.model.gpt import GPT
from gptk.model.pool import BlockPool
from gptk.model.walk import Plan, plan_of


class Part(NamedTuple):
    """Tokens of a row that a pass reads: those that follow what its blocks hold."""

    cache: BlockCache
    row: int
    tokens: "array[int]"
    wanted: int
    """How many of these tokens, the last ones, the states are asked of."""


class JoinedSlots:
    """Where the tokens of a pass go, and what each sees. Used by every layer, as `Slots` are."""

    def __init__(self, pool: BlockPool, parts: Sequence[Part], heads: int) -> None:
        self._pool, self._parts, self._heads = pool, parts, heads
        sequences, tables = array("q"), array("i")
        first = 0
        self.longest = 0
        """The most tokens of a row after the pass."""
        positions: list[int] = []
        wanted: list[int] = []
        for part in parts:
            count, past = len(part.tokens), part.cache.held[part.row]
            sequences.extend((first, count, past, len(tables)))
            tables += part.cache.table(part.row)
            positions += range(past, past + count)
            first += count
            wanted += range(first - part.wanted, first)
            self.longest = max(self.longest, past + count)
        self.positions = torch.tensor([positions], device=pool.device)
        """(1, tokens): the position of each token in its row."""
        self.wanted = (
            None
            if len(wanted) == first
            else torch.tensor(wanted, dtype=torch.int64, device=pool.device)
        )
        """Which tokens the states are asked of; None: of all."""
        self._sequences = torch.frombuffer(sequences, dtype=torch.int64).view(-1, 4)
        self._tables = torch.frombuffer(tables, dtype=torch.int32)

    def walk(self, plan: Plan, x: Tensor, table: Tensor, layers: Sequence[int]) -> Tensor:
        """All blocks in one call: see `gptk.kernels.walk.walk`."""
        return walk(
            *(plan.model, x, table, self.positions[0], self._sequences, self._tables),
            *(self._pool.addresses, self._pool.sample, self.wanted, layers),
        )

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """Store new keys and values, and attend. qkv: (1, tokens, heads + 2 · kv_heads, d).

        Returns (tokens, heads · d).
        """
        qkv = qkv[0].contiguous()
        slab, d = self._pool.sample, qkv.shape[2]
        group = self._heads // slab.shape[3]
        fits = d in kernels.HEAD_DIMS and group <= kernels.FEW_QUERIES
        if fits and kernels.can_run(qkv, slab):
            y = kernels.attend_blocks(
                *(qkv, self._sequences, self._tables, self._pool.addresses, slab),
                *(layer, self._heads),
            )
        else:
            y = self._attend_each(qkv, layer)
        return y.flatten(1)

    def _attend_each(self, qkv: Tensor, layer: int) -> Tensor:
        """`attend` by PyTorch, row by row."""
        heads = self._heads
        kv_heads = (qkv.shape[1] - heads) // 2
        results = []
        for part, (first, count, past, _) in zip(
            self._parts, self._sequences.tolist(), strict=True
        ):
            new = qkv[first : first + count]
            table = part.cache.table(part.row)
            kv = new[:, heads:].reshape(count, 2, kv_heads, -1).permute(1, 2, 0, 3)
            for block in range(past // BLOCK, -(-(past + count) // BLOCK)):
                start, end = max(past, block * BLOCK), min(past + count, (block + 1) * BLOCK)
                piece = kv[:, :, start - past : end - past]
                self._pool.write(layer, table[block], start - block * BLOCK, piece)
            end = past + count
            keys, values = (x[:, :end] for x in self._pool.view(layer, table))
            results.append(_attend_row(new[:, :heads], keys, values, past))
        return torch.cat(results)


def _attend_row(q: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """q: (count, heads, d); keys, values: (kv_heads, past + count, d). Returns q's shape."""
    count, heads, _ = q.shape
    group = heads // len(keys)
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    mask = None
    if count > 1 and past:
        steps = torch.arange(past + count, device=q.device)
        mask = steps <= steps[past:, None]
    causal = count > 1 and not past
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1), keys, values, attn_mask=mask, is_causal=causal
    )
    return y.transpose(0, 1)


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
    slots = JoinedSlots(pool, parts, model.config.n_heads)
    ids = array("q")
    for part in parts:
        ids += part.tokens
    tokens = torch.frombuffer(ids, dtype=torch.int64)[None].to(model.device)
    table = model.position_table(slots.longest)
    if (plan := plan_of(model)) is not None and kernels.can_run(pool.sample, pool.sample):
        x = model.embeddings(tokens, slots.positions)[0]
        states = slots.walk(plan, x, table, list(layers))
    else:
        states = model.states_at(tokens, slots, table, layers)[0]
    for part in parts:
        part.cache.advance(part.row, part.tokens)
    return states
