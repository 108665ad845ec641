"""Tokens of many rows, of any lengths, that a pass reads: where they go, and what each sees."""

import functools
import operator
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.kernels import BLOCK
from gptk.kernels.gpu import Tiling
from gptk.kernels.walk import walk
from gptk.model.attention import PLAIN, Attending, attend_row
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

    @functools.cached_property
    def longest(self) -> int:
        """The most tokens of a row after the pass."""
        return max((past + count for _, count, past, _ in self._sequences), default=0)

    @functools.cached_property
    def _sequences(self) -> list[list[int]]:
        sequences: list[list[int]] = self.sequences.tolist()
        return sequences

    @functools.cached_property
    def _tables(self) -> list[int]:
        tables: list[int] = self.tables.tolist()
        return tables

    def attend(self, qkv: Tensor, layer: int, how: Attending = PLAIN) -> Tensor:
        """Store new keys and values, and attend. qkv: (1, tokens, heads + 2 · kv_heads, d).

        Returns (tokens, heads · d).
        """
        qkv = qkv[0].contiguous()
        where, sample = (self.sequences, self.tables), self.pool.sample
        kv_heads, d = sample.shape[3], sample.shape[5]
        group = self.heads // kv_heads
        is_usual = how.has_usual_scores and qkv.shape[1:] == (self.heads + 2 * kv_heads, d)
        sees_all = (how.window, how.chunk) == (None, None) or how.first(self.longest - 1) == 0
        if self.tiling is not None and is_usual and sees_all:
            from gptk.kernels.triton_attention import attend_blocks  # not on every machine

            slabs = self.addresses, sample
            qkv = how.scaled(qkv, self.heads)
            return attend_blocks(qkv, *where, *slabs, layer, self.heads, self.tiling).flatten(1)
        fits = d in kernels.HEAD_DIMS and group <= kernels.FEW_QUERIES
        fits = fits and is_usual and (how.chunk is None or sees_all)
        if fits and kernels.can_run(qkv, sample):
            qkv = how.scaled(qkv, self.heads)
            window = how.window or 0
            y = kernels.attend_blocks(qkv, *where, self.pool.for_kernels, layer, self.heads, window)
        else:
            y = self._attend_by_pytorch(qkv, layer, how)
        return y.flatten(1)

    def _attend_by_pytorch(self, qkv: Tensor, layer: int, how: Attending) -> Tensor:
        """`attend`, sequence by sequence. Tokens of no sequence get zeros.

        A layer may have fewer or smaller heads than the pool's blocks have room for.
        """
        pool, heads = self.pool, self.heads
        kv_heads, d = (qkv.shape[1] - heads) // 2, qkv.shape[2]
        room = pool.sample.shape[3] - kv_heads, pool.sample.shape[5] - d
        result = qkv.new_zeros(len(qkv), heads, d)
        for first, count, past, table in self._sequences:
            if not count:
                continue
            new, end = qkv[first : first + count], past + count
            blocks = self._tables[table : table + -(-end // BLOCK)]
            kv = new[:, heads:].reshape(count, 2, kv_heads, d).permute(1, 2, 0, 3)
            kv = F.pad(kv, (0, room[1], 0, 0, 0, room[0])) if any(room) else kv
            for number in range(past // BLOCK, len(blocks)):
                start, stop = max(past, number * BLOCK), min(end, (number + 1) * BLOCK)
                piece = kv[:, :, start - past : stop - past]
                pool.write(layer, blocks[number], start - number * BLOCK, piece)
            unseen = how.first(past) // BLOCK  # blocks that none of these tokens sees
            keys, values = pool.view(layer, blocks[unseen:])
            seen = slice(0, kv_heads), slice(0, end - unseen * BLOCK), slice(0, d)
            result[first : first + count] = attend_row(
                new[:, :heads], keys[seen], values[seen], past, unseen * BLOCK, how
            )
        return result


def read_into_caches(
    parts: Sequence[Part], read: Callable[[BlockPool], Tensor], *, beyond: bool = False
) -> Tensor:
    """What `read` returns, which reads the tokens of all parts; their caches hold them afterwards.

    beyond: take blocks beyond the pool's budget. Raises OutOfBlocks, with nothing read.
    """
    for part in parts:
        part.cache.prepare(part.row, len(part.tokens), beyond=beyond)
    states = read(parts[0].cache.pool)
    for part in parts:
        part.cache.advance(part.row, part.tokens)
    return states


def tokens_and_slots(
    pool: BlockPool, numbers: Numbers, heads: int, tiling: Tiling | None = None
) -> tuple[Tensor, JoinedSlots]:
    """The ids of a pass, (1, tokens), and where they go. tiling: how `numbers` was divided, for
    Triton's kernels on the pool's device."""
    all_wanted = len(numbers.wanted) == len(numbers.tokens)
    if tiling is None:
        slots = JoinedSlots(
            *(pool, heads, as_tensor(numbers.positions)[None].to(pool.device)),
            None if all_wanted else as_tensor(numbers.wanted).to(pool.device),
            *(as_tensor(numbers.sequences).view(-1, 4), as_tensor(numbers.tables), pool.addresses),
        )
        return as_tensor(numbers.tokens)[None].to(pool.device), slots
    tables = array("q", numbers.tables)
    each = [numbers.tokens, numbers.positions, numbers.sequences, tables, numbers.wanted]
    together = as_tensor(functools.reduce(operator.add, each)).to(pool.device)  # one copy
    tokens, positions, tiles, blocks, wanted = torch.split(together, list(map(len, each)))
    where = tiles.view(-1, 4), blocks, pool.addresses
    asked = None if all_wanted else wanted
    return tokens[None], JoinedSlots(pool, heads, positions[None], asked, *where, tiling)


def as_tensor(numbers: "array[int]") -> Tensor:
    """A tensor of the same memory, int64 or int32, on the CPU."""
    dtype = torch.int64 if numbers.typecode == "q" else torch.int32
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
