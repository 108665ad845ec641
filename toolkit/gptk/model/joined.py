"""Tokens of many rows, of any lengths, that a pass reads: where they go, and what each sees."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptk import kernels
from gptk.kernels import BLOCK
from gptk.kernels.gpu import Tiling
from gptk.kernels.walk import walk
from gptk.model.attention import Scoring, softmax_attention, visible
from gptk.model.blocks import BlockCache
from gptk.model.pool import BlockPool
from gptk.model.walk import Plan


class Part(NamedTuple):
    """Tokens of a row that a pass reads: those that follow what its blocks hold."""

    cache: BlockCache
    row: int
    tokens: "array[int]"
    wanted: int
    """How many of these tokens, the last ones, the states are asked of."""


class Numbers:
    """What a pass reads, in numbers."""

    def __init__(self, parts: Sequence[Part], most: int | None = None) -> None:
        """most: the most tokens of a sequence; more of a row become several sequences."""
        self.tokens, self.positions = array("q"), array("q")
        """Of each token its id, and its position in its row."""
        self.sequences = array("q")
        """Four numbers for each sequence: its first token, how many it has, how many tokens of its
        row come before it, and where the row's blocks begin in `tables`."""
        self.tables = array("i")
        """The numbers of the rows' blocks, one row after the other."""
        self.wanted: array[int] = array("q")
        """The tokens that the states are asked of."""
        self.longest = 0
        """The most tokens of a row after the pass."""
        first = 0
        for part in parts:
            count, past = len(part.tokens), part.cache.held[part.row]
            if most is None or count <= most:
                self.sequences.extend((first, count, past, len(self.tables)))
            else:
                for start in range(0, count, most):
                    size = min(most, count - start)
                    self.sequences.extend((first + start, size, past + start, len(self.tables)))
            self.tables += part.cache.table(part.row)
            self.tokens += part.tokens
            self.positions.extend(range(past, past + count))
            first += count
            self.wanted.extend(range(first - part.wanted, first))
            self.longest = max(self.longest, past + count)


@dataclass(frozen=True)
class JoinedSlots:
    """Where the tokens of a pass go, and what each sees. Used by every layer, as `Slots` are."""

    pool: BlockPool
    heads: int
    """Query heads."""
    positions: Tensor
    """(1, tokens): the position of each token in its row."""
    wanted: Tensor | None
    """Which tokens the states are asked of; None: of all."""
    sequences: Tensor
    """(n, 4) int64, see `Numbers`. With a tiling on its device, otherwise on the CPU."""
    tables: Tensor
    """See `Numbers`: int64 with a tiling, otherwise int32 on the CPU."""
    addresses: Tensor
    """Where the pool's slabs are."""
    tiling: Tiling | None = None
    """How the work is divided on a GPU; the sequences are its tiles. None: Triton does not run."""

    def walk(self, plan: Plan, x: Tensor, table: Tensor, layers: Sequence[int]) -> Tensor:
        """All blocks in one call: see `gptk.kernels.walk.walk`."""
        return walk(
            *(plan.model, x, table, self.positions[0], self.sequences, self.tables),
            *(self.pool.for_kernels, self.wanted, layers),
        )

    def attend(self, qkv: Tensor, layer: int, scoring: Scoring) -> Tensor:
        """Store new keys and values, and attend. qkv: (1, tokens, heads + 2 · kv_heads, d).

        Returns (tokens, heads · d).
        """
        qkv = qkv[0].contiguous()
        where, sample = (self.sequences, self.tables), self.pool.sample
        if self.tiling is not None:
            from gptk.kernels.triton_attention import attend_blocks  # not on every machine

            slabs = self.addresses, sample
            return attend_blocks(qkv, *where, *slabs, layer, self.heads, self.tiling).flatten(1)
        d, group = qkv.shape[2], self.heads // sample.shape[3]
        fits = d in kernels.HEAD_DIMS and group <= kernels.FEW_QUERIES
        fits = fits and scoring.is_usual
        if fits and kernels.can_run(qkv, sample):
            y = kernels.attend_blocks(
                qkv, *where, self.pool.for_kernels, layer, self.heads, scoring.window or 0
            )
        else:
            y = self._attend_by_pytorch(qkv, layer, scoring)
        return y.flatten(1)

    def _attend_by_pytorch(self, qkv: Tensor, layer: int, scoring: Scoring) -> Tensor:
        """`attend`, sequence by sequence. Tokens of no sequence get zeros."""
        pool, heads = self.pool, self.heads
        kv_heads = (qkv.shape[1] - heads) // 2
        result = qkv.new_zeros(len(qkv), heads, qkv.shape[2])
        tables = self.tables.tolist()
        for first, count, past, table in self.sequences.tolist():
            if not count:
                continue
            new, end = qkv[first : first + count], past + count
            blocks = tables[table : table + -(-end // BLOCK)]
            first_block = 0
            if scoring.window is not None:
                first_block = max(0, past + 1 - scoring.window) // BLOCK
            kv = new[:, heads:].reshape(count, 2, kv_heads, -1).permute(1, 2, 0, 3)
            for number in range(past // BLOCK, len(blocks)):
                start, stop = max(past, number * BLOCK), min(end, (number + 1) * BLOCK)
                piece = kv[:, :, start - past : stop - past]
                pool.write(layer, blocks[number], start - number * BLOCK, piece)
            begin = first_block * BLOCK
            seen = pool.view(layer, blocks[first_block:])
            keys, values = (x[:, : end - begin] for x in seen)
            result[first : first + count] = _attend_row(
                new[:, :heads], keys, values, past, begin, scoring
            )
        return result


def _attend_row(
    q: Tensor, keys: Tensor, values: Tensor, past: int, begin: int, scoring: Scoring
) -> Tensor:
    """q: (count, heads, d); keys, values: of the tokens from `begin` on, (kv_heads, past + count -
    begin, d). Returns q's shape."""
    count, heads, _ = q.shape
    group = heads // len(keys)
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    slides = scoring.window is not None and past + count > scoring.window
    mask = None
    if slides or (count > 1 and past):
        positions = torch.arange(past, past + count, device=q.device)
        mask = visible(positions, begin, past + count, scoring)
    is_causal = count > 1 and mask is None
    y = softmax_attention(q.transpose(0, 1), keys, values, mask, scoring, is_causal=is_causal)
    return y.transpose(0, 1)


def as_tensor(numbers: "array[int]") -> Tensor:
    """A tensor of the same memory, int64 or int32, on the CPU."""
    dtype = torch.int64 if numbers.typecode == "q" else torch.int32
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
