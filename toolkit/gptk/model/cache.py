"""The KV cache: keys and values of every layer. Rows of one prompt share a tree of slots.

Rows of one prompt, such as beams, have their keys and values in one sequence of slots, which holds
the prompt once. A row's tokens are a path through this tree, and a mask says which slots a row sees
(tree attention: SpecInfer, Miao et al. 2024). So forking, reordering and pruning rows changes the
mask and moves no keys. Slots that no row sees any more are removed now and then, by a compaction.

    slots    0   1   2   3   4   5   6   7
             the cat sat lay on  by  a   the
    row 0    x   x   x       x       x           the cat sat on a
    row 1    x   x       x       x       x       the cat lay by the

A pass takes memory for each row and each slot of its tree. So that it does not grow with the square
of the rows, a prompt with very many rows gets several trees, each with a copy of the prompt.

If each row has its own tree, without gaps, and all rows have the same length, then slots are
positions, and no mask is needed. Slots that no row sees must hold finite numbers, as a masked
weight of 0 times infinity is not 0. Memory is reserved ahead and grows when it runs out.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptk.model.paths import Paths, tree_index_of


@dataclass(frozen=True)
class Slots:
    """The slots that a forward pass writes and sees. Made once a pass, used by every layer."""

    positions: Tensor
    """(1 or rows, time): the position of each new token."""
    start: int
    """The first slot written in each tree. From there on each row of it has `time` slots."""
    end: int
    """One past the last slot used after this pass."""
    group: int
    """Query heads that share keys."""
    trees: int
    rows_per_tree: int
    """The most rows that a tree has. Every tree has room for this many in this pass."""
    tree_index: Tensor | None
    """(rows,): tree · rows_per_tree + the row's index in its tree; None if these are 0, 1, …"""
    starts: list[int]
    """For each row the first slot written."""
    mask: Tensor | None
    """(1 or trees, rows_per_tree · time, end), in the model's dtype, added to the scores of all
    heads: 0 for slots that a query sees, -inf for others. None: it sees all."""
    window_mask: Tensor | None
    """The same in layers with a sliding window."""
    causal: bool
    """Queries and keys are the same tokens: plain causal attention."""
    one_token_per_tree: bool
    """Each tree has one row with one token, in the order of the rows."""
    written: tuple[Tensor, ...]
    """For each layer the slots that are written: (2, trees, kv_heads, rows_per_tree, time,
    head_dim), or with one token per tree (2, trees, kv_heads, 1, head_dim)."""
    keys: tuple[Tensor, ...]
    """For each layer all keys up to `end`, (trees · kv_heads, 1, end, head_dim)."""
    values: tuple[Tensor, ...]

    def of_heads(self, mask: Tensor | None) -> Tensor | None:
        """A mask as (1 or trees · kv_heads, 1, group · rows_per_tree · time, end)."""
        if mask is None:
            return None
        known = self._masks_of_heads.get(id(mask))
        if known is None:
            known = mask.repeat(1, self.group, 1) if self.group > 1 else mask
            kv_heads = len(self.keys[0]) // self.trees
            known = known.repeat_interleave(kv_heads, dim=0) if len(known) > 1 else known
            self._masks_of_heads[id(mask)] = known = known[:, None]
        return known

    @functools.cached_property
    def _masks_of_heads(self) -> dict[int, Tensor]:
        return {}

    def write(self, layer: int, new: Tensor) -> None:
        """Store a layer's new keys and values, (rows, time, 2, kv_heads, head_dim)."""
        if self.one_token_per_tree:
            self.written[layer].copy_(new.permute(2, 0, 3, 1, 4))
        else:
            self.written[layer].copy_(self.by_tree(new).permute(3, 0, 4, 1, 2, 5))

    def by_tree(self, x: Tensor) -> Tensor:
        """(rows, …) as (trees, rows_per_tree, …), with zeros where a tree has fewer rows."""
        if self.tree_index is not None:
            full = x.new_zeros((self.trees * self.rows_per_tree, *x.shape[1:]))
            x = full.index_copy_(0, self.tree_index, x)
        return x.view(self.trees, self.rows_per_tree, *x.shape[1:])

    def by_row(self, y: Tensor) -> Tensor:
        """(trees · rows_per_tree, …) as (rows, …)."""
        return y if self.tree_index is None else y[self.tree_index]


class KVCache:
    """Keys and values of `n_layers` layers for a changing set of rows.

    They are one tensor, (n_layers, 2, trees, kv_heads, capacity, head_dim): keys, then values. At
    first each row has its own tree. After `select`, copies of a row share a tree; `separate_rows`
    gives each row its own tree again.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> None:
        """window: how many tokens, the last ones, queries see in some layers."""
        shape = (n_layers, 2, rows, n_kv_heads, capacity, head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self._window = window
        self._expected = capacity
        """The tokens that a row is expected to reach."""
        self.lengths = [0] * rows
        """Tokens held for each row."""
        self._trees = list(range(rows))
        """The tree of each row."""
        self._used = 0
        """Slots in use, in every tree."""
        self._paths: Paths | None = None
        """The slots of each row's tokens; None if each row has its own tree and slots 0, 1, …"""
        self._compact_from = 0
        """From this many slots in use on, `plan` compacts the cache."""
        self._forked = False
        """Rows were forked since the last compaction."""

    @property
    def capacity(self) -> int:
        """How many slots each tree has memory for."""
        return self.kv.shape[4]

    def plan(self, time: int, group: int = 1) -> Slots:
        """The slots for `time` new tokens of every row. Reserves memory for them.

        group: query heads that share keys. Lengths change in `advance`, after the pass.
        """
        device, lengths = self.kv.device, self.lengths
        longest, shortest = max(lengths), min(lengths)
        if self._paths is not None:
            if self._used >= self._compact_from:
                self._compact()
            self._split_trees()
        trees = self.kv.shape[2]
        tree_index, rows_per_tree = tree_index_of(self._trees, trees)
        start, end = self._used, self._used + rows_per_tree * time
        starts = [start + time * (index % rows_per_tree) for index in tree_index]
        if end > self.capacity:
            self.reserve(max(end + end // 4, 2 * self.capacity))
        steps = torch.arange(time, device=device)
        if longest == shortest:
            positions = (steps + longest)[None]
        else:
            positions = torch.tensor(lengths, device=device)[:, None] + steps
        causal = longest == 0 and time > 1
        mask = None
        if not causal and self._paths is not None:
            mask = self._paths.mask(tree_index, trees * rows_per_tree, starts, start, end, time)
            mask = mask.view(trees, rows_per_tree * time, end)
        elif not causal and time > 1:
            seen = torch.arange(end, device=device) <= (steps + start)[:, None]
            mask = self.kv.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None]
        window_mask = mask
        if not causal and self._window is not None and longest + time > self._window:
            window_mask = self._window_mask(
                mask, tree_index, trees * rows_per_tree, starts, end, time
            )
        in_order = tree_index == list(range(trees * rows_per_tree))
        one_token_per_tree = in_order and rows_per_tree == time == 1
        written = self.kv.narrow(4, start, end - start)
        if not one_token_per_tree:
            written = written.view(*written.shape[:4], rows_per_tree, time, -1)
        keys, values = self.kv.flatten(2, 3)[:, :, :, None, :end].unbind(1)
        return Slots(
            positions=positions,
            start=start,
            end=end,
            group=group,
            trees=trees,
            rows_per_tree=rows_per_tree,
            tree_index=None if in_order else torch.tensor(tree_index, device=device),
            starts=starts,
            mask=mask,
            window_mask=window_mask,
            causal=causal,
            one_token_per_tree=one_token_per_tree,
            written=written.unbind(),
            keys=keys.unbind(),
            values=values.unbind(),
        )

    def _window_mask(
        self,
        mask: Tensor | None,
        tree_index: Sequence[int],
        count: int,
        starts: Sequence[int],
        end: int,
        time: int,
    ) -> Tensor:
        """The mask, where each query sees the last tokens of its row only: the slots of a row's
        tokens ascend. tree_index: of each row, below `count`; for the others see `Slots`."""
        assert self._window is not None
        first = np.zeros((count, time), dtype=np.int64)  # the first slot that each query sees
        for row, (index, length) in enumerate(zip(tree_index, self.lengths, strict=True)):
            for query in range(max(0, self._window - length - 1), time):
                oldest = length + query + 1 - self._window
                if oldest >= length:
                    first[index, query] = starts[row] + oldest - length
                elif self._paths is not None:
                    first[index, query] = self._paths.slots[row, oldest]
                else:
                    first[index, query] = oldest
        if mask is None:
            mask = self.kv.new_zeros(1, 1, end)
        firsts = torch.from_numpy(first).to(mask.device).view(self.kv.shape[2], -1, 1)
        hidden = torch.arange(end, device=mask.device) < firsts
        return mask.expand(len(hidden), -1, -1).masked_fill(hidden, -torch.inf)

    def advance(self, counts: Sequence[int], slots: Slots) -> None:
        """Append `counts[i]` of the tokens just written for row i; the rest is padding."""
        time = (slots.end - slots.start) // slots.rows_per_tree
        self._used = slots.end
        padded = min(counts) < time
        if self._paths is None and padded:
            self._paths = Paths(self.lengths, self.kv)
        if self._paths is not None:
            self._paths.extend(self.lengths, slots.starts, counts)
        self.lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        if self._paths is not None and (padded or slots.mask is None):
            self._paths.update_mask(self.lengths)

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        if list(parents) == list(range(len(self.lengths))):
            return
        if self._paths is None:
            self._paths = Paths(self.lengths, self.kv)
            self._compact_from = 0
        self._forked |= len(set(parents)) < len(parents)
        self._paths.select(parents)
        self.lengths = [self.lengths[p] for p in parents]
        self._trees = [self._trees[p] for p in parents]
        kept = sorted(set(self._trees))
        if len(kept) < self.kv.shape[2]:
            # No row is left of some prompts: free their memory.
            self.kv = self.kv[:, :, torch.tensor(kept, device=self.kv.device)]
            self._trees = [kept.index(tree) for tree in self._trees]
        self._drop_unused()

    def separate_rows(self) -> None:
        """Give each row its own tree."""
        if self._paths is None:
            return
        longest = max(self.lengths)
        slots = torch.from_numpy(self._paths.slots[:, :longest]).to(self.kv.device)
        n_layers, _, _, n_kv_heads, _, head_dim = self.kv.shape
        capacity = max(self._expected, longest + longest // 4)
        new = self.kv.new_zeros((n_layers, 2, len(slots), n_kv_heads, capacity, head_dim))
        for row, tree in enumerate(self._trees):
            new[:, :, row, :, :longest] = self.kv[:, :, tree].index_select(3, slots[row])
        self.kv = new
        self._trees = list(range(len(slots)))
        self._paths = Paths(self.lengths, self.kv)
        self._drop_unused()

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        if self._paths is None and len(set(counts)) > 1:
            self._paths = Paths(self.lengths, self.kv)
        if self._paths is not None:
            self._paths.rewind(self.lengths, counts)
        self.lengths = [have - drop for have, drop in zip(self.lengths, counts, strict=True)]
        self._drop_unused()

    def clear(self) -> None:
        """Drop all tokens of all rows, and keep the memory."""
        self.lengths = [0] * len(self.lengths)
        self.separate_rows()
        self._used = 0
        self._paths = None

    def _drop_unused(self) -> None:
        """Free the slots after the last one that a row sees; drop the paths if not needed."""
        if self._paths is None:
            self._used = self.lengths[0]
            return
        self._used = self._paths.end(self.lengths)
        separate = self._trees == list(range(self.kv.shape[2]))
        if separate and all(length == self._used for length in self.lengths):
            self._paths = None

    def _compact(self) -> None:
        """Remove the slots that no row sees; or separate rows that have little in common."""
        assert self._paths is not None
        used = self._used
        seen = np.zeros((self.kv.shape[2], used), dtype=bool)
        for tree, slots, length in zip(self._trees, self._paths.slots, self.lengths, strict=True):
            seen[tree, slots[:length]] = True
        counts = seen.sum(axis=1)
        if self._have_little_in_common(int(counts.max())):
            self.separate_rows()
            counts = np.array(self.lengths)
        elif counts.max() < used:
            first = int(seen.argmin(axis=1).min())  # slots before it are not moved
            kept = np.argsort(~seen[:, first:], axis=1, kind="stable")[:, : counts.max() - first]
            for tree, moved in enumerate(torch.from_numpy(kept).to(self.kv.device)):
                kv = self.kv[:, :, tree, :, first:used]
                kv[:, :, :, : len(moved)] = kv.index_select(3, moved)
            self._paths.renumber(self.lengths, seen.cumsum(axis=1) - 1, self._trees)
            self._drop_unused()
        self._forked = False
        self._compact_from = int(counts.max() * 5 // 4) + _SPARE

    def _have_little_in_common(self, count: int) -> bool:
        """Whether rows are better kept in trees of their own. count: slots seen in a tree."""
        longest = max(self.lengths)
        separate, shared = len(self.lengths) * longest, self.kv.shape[2] * count
        return (
            not self._forked
            and count > _SEPARATE_FROM * longest
            and separate <= _SEPARATE_FROM * shared
        )

    def _split_trees(self) -> None:
        """Give more trees to very many rows, each tree about as many rows as the others."""
        rows, trees = len(self._trees), self.kv.shape[2]
        if rows <= _MOST_ROWS:
            return
        most = min(_MOST_ROWS, 2 * -(-rows // trees))
        sizes = Counter(self._trees)
        if max(sizes.values()) <= most:
            return
        parts = {tree: -(-size // most) for tree, size in sizes.items()}
        first: dict[int, int] = {}  # of each old tree the first new one
        copied: list[int] = []  # of each new tree the old one
        for tree in sorted(sizes):
            first[tree] = len(copied)
            copied += [tree] * parts[tree]
        seen: Counter[int] = Counter()
        for row, tree in enumerate(self._trees):
            self._trees[row] = first[tree] + seen[tree] * parts[tree] // sizes[tree]
            seen[tree] += 1
        self.kv = self.kv[:, :, torch.tensor(copied, device=self.kv.device)]

    def reserve(self, capacity: int) -> None:
        """Grow the memory to `capacity` slots in each tree."""
        *shape, _, head_dim = self.kv.shape
        new = self.kv.new_zeros((*shape, capacity, head_dim))
        new[..., : self._used, :] = self.kv[..., : self._used, :]
        self.kv = new
        if self._paths is not None:
            self._paths.reserve(capacity)


_SPARE = 64
"""Unseen slots that are left, beyond a quarter of the seen ones, before the next compaction:
attention over them takes microseconds."""
_SEPARATE_FROM = 4
"""Unforked rows get trees of their own once the slots they use together exceed this many times
the longest row, unless that would take more than this many times the memory."""
_MOST_ROWS = 64
"""More rows than this are divided between trees."""
