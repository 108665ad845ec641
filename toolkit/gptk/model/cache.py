"""The KV cache: keys and values of every layer. Rows of one prompt share a tree of slots.

Rows of one prompt, such as beams, have their keys and values in one sequence of slots, which holds
the prompt once. A row's tokens are a path through this tree, and a mask says which slots a row sees
(tree attention: SpecInfer, Miao et al. 2024). So forking, reordering and pruning rows changes the
mask and moves no keys. Slots that no row sees any more are removed now and then, by a compaction.

    slots    0   1   2   3   4   5   6   7
             the cat sat lay on  by  a   the
    row 0    x   x   x       x       x           the cat sat on a
    row 1    x   x       x       x       x       the cat lay by the

If each row has its own tree, without gaps, and all rows have the same length, then slots are
positions, and no mask is needed. Slots that no row sees must hold finite numbers, as a masked
weight of 0 times infinity is not 0. Memory is reserved ahead and grows when it runs out.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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

    @functools.cached_property
    def mask_of_heads(self) -> Tensor | None:
        """The mask as (1 or trees · kv_heads, 1, group · rows_per_tree · time, end)."""
        if self.mask is None:
            return None
        mask = self.mask.repeat(1, self.group, 1) if self.group > 1 else self.mask
        kv_heads = len(self.keys[0]) // self.trees
        mask = mask.repeat_interleave(kv_heads, dim=0) if len(mask) > 1 else mask
        return mask[:, None]

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
    ) -> None:
        shape = (n_layers, 2, rows, n_kv_heads, capacity, head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows
        """Tokens held for each row."""
        self._trees = list(range(rows))
        """The tree of each row."""
        self._used = 0
        """Slots in use, in every tree."""
        self._paths: _Paths | None = None
        """The slots of each row's tokens; None if each row has its own tree and slots 0, 1, …"""
        self._compact_from = 0
        """From this many slots in use on, `plan` compacts the cache."""
        self._forked = False
        """Rows were forked since the last compaction."""

    @property
    def capacity(self) -> int:
        """How many slots each tree has memory for."""
        return self.kv.shape[4]

    @property
    def slots_are_positions(self) -> bool:
        """Each row has its own tree, without gaps, and all rows have the same length."""
        return self._paths is None and len(set(self.lengths)) == 1

    def plan(self, time: int, group: int = 1) -> Slots:
        """The slots for `time` new tokens of every row. Reserves memory for them.

        group: query heads that share keys. Lengths change in `advance`, after the pass.
        """
        device, lengths = self.kv.device, self.lengths
        longest, shortest = max(lengths), min(lengths)
        if self._paths is not None and self._used >= self._compact_from:
            self._compact()
        trees = self.kv.shape[2]
        tree_index, rows_per_tree = _tree_index(self._trees, trees)
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
            causal=causal,
            one_token_per_tree=one_token_per_tree,
            written=written.unbind(),
            keys=keys.unbind(),
            values=values.unbind(),
        )

    def advance(self, counts: Sequence[int], slots: Slots) -> None:
        """Append `counts[i]` of the tokens just written for row i; the rest is padding."""
        time = (slots.end - slots.start) // slots.rows_per_tree
        self._used = slots.end
        padded = min(counts) < time
        if self._paths is None and padded:
            self._paths = _Paths(self.lengths, self.kv)
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
            self._paths = _Paths(self.lengths, self.kv)
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
        n_layers, _, _, *rest = self.kv.shape
        new = self.kv.new_zeros((n_layers, 2, len(slots), *rest))
        for row, tree in enumerate(self._trees):
            new[:, :, row, :, :longest] = self.kv[:, :, tree].index_select(3, slots[row])
        self.kv = new
        self._trees = list(range(len(slots)))
        self._paths = _Paths(self.lengths, self.kv)
        self._drop_unused()

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        if self._paths is None and len(set(counts)) > 1:
            self._paths = _Paths(self.lengths, self.kv)
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
        if not self._forked and counts.max() > _SEPARATE_FROM * max(self.lengths):
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
the longest row."""


class _Paths:
    """The path of each row through its tree: the slots of its tokens, and so what it sees."""

    def __init__(self, lengths: Sequence[int], kv: Tensor) -> None:
        capacity = kv.shape[4]
        self.slots = np.broadcast_to(np.arange(capacity), (len(lengths), capacity)).copy()
        """(rows, capacity) int64, on the host: the slot of each token, in ascending order."""
        self._mask = kv.new_empty(len(lengths), capacity)
        """(rows, capacity), in kv's dtype: 0 for slots that a row sees, -inf for others."""
        self.update_mask(lengths)

    def mask(
        self,
        tree_index: Sequence[int],
        count: int,
        starts: list[int],
        start: int,
        end: int,
        time: int,
    ) -> Tensor:
        """Mark the new slots as seen by their rows; return the mask of a pass.

        Each query sees the slots of its row, and its new ones up to itself.

        tree_index: of each row, below `count`; the other arguments are those of `Slots`. Returns
        (count · time, end).
        """
        first = torch.tensor(starts, device=self._mask.device)[:, None]
        new = torch.arange(start, end, device=first.device)
        # What a row's last query sees, which is what the row sees from then on.
        self._mask[:, start:end] = self._additive((new >= first) & (new < first + time))
        rows = self._mask[:, None, :end]
        if time > 1:
            rows = rows.repeat(1, time, 1)
            for query in range(time):
                visible = (new >= first) & (new <= first + query)
                rows[:, query, start:end] = self._additive(visible)
        if list(tree_index) != list(range(count)):
            # An index without a row sees all slots: a softmax over none would give NaN.
            full = rows.new_zeros(count, time, end)
            rows = full.index_copy_(0, torch.tensor(tree_index, device=rows.device), rows)
        return rows.reshape(-1, end)

    def extend(self, lengths: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Append to row i counts[i] tokens, in the slots from starts[i] on."""
        longest = max(have + new for have, new in zip(lengths, counts, strict=True))
        if longest > self.slots.shape[1]:
            self.slots = np.pad(self.slots, ((0, 0), (0, longest)))
        for slots, have, start, new in zip(self.slots, lengths, starts, counts, strict=True):
            slots[have : have + new] = range(start, start + new)

    def select(self, parents: Sequence[int]) -> None:
        self.slots = self.slots[list(parents)]
        self._mask = self._mask[torch.tensor(parents, device=self._mask.device)]

    def rewind(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            if count:
                dropped = torch.from_numpy(self.slots[row, length - count : length])
                self._mask[row, dropped.to(self._mask.device)] = -torch.inf

    def end(self, lengths: Sequence[int]) -> int:
        """One past the last slot that a row sees."""
        last = [row[length - 1] for row, length in zip(self.slots, lengths, strict=True) if length]
        return int(max(last, default=-1)) + 1

    def renumber(self, lengths: Sequence[int], new_slots: np.ndarray, trees: Sequence[int]) -> None:
        """Slot i of a tree has become new_slots[tree, i]. trees: the tree of each row."""
        for row, (length, tree) in enumerate(zip(lengths, trees, strict=True)):
            self.slots[row, :length] = new_slots[tree, self.slots[row, :length]]
        self.update_mask(lengths)

    def reserve(self, capacity: int) -> None:
        """Grow the mask to `capacity` slots."""
        more = self._mask.new_full((len(self._mask), capacity - self._mask.shape[1]), -torch.inf)
        self._mask = torch.cat((self._mask, more), dim=1)

    def update_mask(self, lengths: Sequence[int]) -> None:
        """Compute the mask from `slots`: each row sees the slots of its tokens."""
        seen = np.zeros(self._mask.shape, dtype=bool)
        for row, length in enumerate(lengths):
            seen[row, self.slots[row, :length]] = True
        self._mask = self._additive(torch.from_numpy(seen).to(self._mask.device))

    def _additive(self, visible: Tensor) -> Tensor:
        """0 where visible, -inf elsewhere."""
        return self._mask.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)


def _tree_index(trees: Sequence[int], count: int) -> tuple[list[int], int]:
    """For each row tree · rows_per_tree + its index in its tree; and rows_per_tree.

    trees: the tree of each row, below `count`. rows_per_tree: the most rows that one of them has.
    """
    sizes = [0] * count
    index_in_tree = []
    for tree in trees:
        index_in_tree.append(sizes[tree])
        sizes[tree] += 1
    most = max(sizes)
    return [tree * most + index for tree, index in zip(trees, index_in_tree, strict=True)], most
