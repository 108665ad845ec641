"""The KV cache: keys and values of every layer, with rows that share what they have in common.

A row's past is a path through a tree: rows that come of one prompt, such as beams, stand in one
sequence of slots, in which the prompt has its place once. Which slots a row may look at is a mask
(tree attention: SpecInfer, Miao et al. 2024), so that forking, reordering and pruning rows moves
no keys: they change the mask. Slots that no row looks at any more are squeezed out now and then.

    slots    0   1   2   3   4   5   6   7
             the cat sat lay on  by  a   the
    row 0    x   x   x       x       x           the cat sat on a
    row 1    x   x       x       x       x       the cat lay by the

Where each row has a tree of its own and no gaps, its slots are its positions and no mask is
needed: one prompt, or several of a length. Slots out of sight must be finite, as a masked weight
of zero times infinity is not zero. Memory is reserved ahead and grows when it runs out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Where one forward pass writes and what it may see; made once, used by every layer."""

    positions: Tensor
    """(1 or rows, time): the position of each new token."""
    start: int
    """The first slot written in each tree; the places of a tree follow, `time` slots each."""
    end: int
    """One past the last slot used after this pass."""
    trees: int
    places: int
    """How many rows a tree has room for in this pass."""
    order: Tensor | None
    """(rows,): for each row tree · places + place; None where that is the row's own number."""
    starts: list[int]
    """For each row the first slot written."""
    mask: Tensor | None
    """(1 or trees, 1, queries, end), of the model's dtype, added to attention's scores: 0 where a
    query may look, -inf elsewhere; queries: (group, places, time). None: it needs no mask."""
    causal: bool
    """Queries and keys are the same tokens: plain causal attention."""

    def by_tree(self, x: Tensor) -> Tensor:
        """(rows, time, heads, d) as (trees, places, time, heads, d), with zeros for no row."""
        if self.order is not None:
            full = x.new_zeros((self.trees * self.places, *x.shape[1:]))
            x = full.index_copy_(0, self.order, x)
        return x.view(self.trees, self.places, *x.shape[1:])

    def by_row(self, y: Tensor) -> Tensor:
        """(trees · places, …) as (rows, …)."""
        return y if self.order is None else y[self.order]


class KVCache:
    """Keys and values of `n_layers` layers for a changing set of rows.

    Each layer is one tensor (2, trees, kv_heads, capacity, head_dim): keys, then values. At first
    each row has a tree. `select` lets copies of a row share one; `part` gives each its own.
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
        shape = (2, rows, n_kv_heads, capacity, head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.lengths = [0] * rows
        """Tokens held for each row."""
        self._device, self._dtype = device, dtype
        self._trees = list(range(rows))
        """For each row its tree."""
        self._used = 0
        """Slots in use, of every tree."""
        self._at: _Paths | None = None
        """Where the rows stand; None where each has tree `row` and slots 0, 1, … without gaps."""
        self._squeeze_at = 0
        """Slots in use at which to look for those that no row sees."""
        self._forked = False
        """Rows were forked since slots were last squeezed."""

    @property
    def capacity(self) -> int:
        """Slots there is memory for, in each tree."""
        return self.layers[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Memory reserved, in all."""
        return sum(kv.nbytes for kv in self.layers)

    def plan(self, time: int, group: int = 1) -> Slots:
        """The slots for `time` new tokens on every row; makes room for them.

        group: query heads that share keys, and come in attention as so many queries.
        """
        device, lengths = self._device, self.lengths
        longest, shortest = max(lengths), min(lengths)
        if self._at is not None and self._used >= self._squeeze_at:
            self._squeeze()
        trees = self.layers[0].shape[1]
        place, places = _places(self._trees, trees)
        start, end = self._used, self._used + places * time
        starts = [start + time * (one % places) for one in place]
        if end > self.capacity:
            self._reserve(max(end + end // 4, 2 * self.capacity))
        steps = torch.arange(time, device=device)
        if longest == shortest:
            positions = (steps + longest)[None]
        else:
            positions = torch.tensor(lengths, device=device)[:, None] + steps
        causal = longest == 0 and time > 1
        mask = None
        if not causal and self._at is not None:
            mask = self._seen(place, starts, time, trees * places, start, end)
            mask = mask.view(trees, 1, places * time, end)
        elif not causal and time > 1:
            mask = torch.arange(end, device=device) <= (steps + start)[:, None]
            mask = mask[None, None]
        if mask is not None:
            zeros = torch.zeros(mask.shape, dtype=self._dtype, device=device)
            mask = zeros.masked_fill_(~mask, -torch.inf).repeat(1, 1, group, 1)
        in_order = place == list(range(trees * places))
        order = None if in_order else torch.tensor(place, device=device)
        return Slots(positions, start, end, trees, places, order, starts, mask, causal)

    def write(self, layer: int, keys: Tensor, values: Tensor, at: Slots) -> tuple[Tensor, Tensor]:
        """Store new keys and values, both (rows, time, kv_heads, head_dim).

        Returns all keys and values up to `at.end`, (trees, kv_heads, end, head_dim). Lengths move
        on in `advance`, once a pass.
        """
        kv = self.layers[layer]
        new = kv[:, :, :, at.start : at.end]
        for part, x in zip(new.unbind(), (keys, values), strict=True):
            part.copy_(at.by_tree(x).flatten(1, 2).transpose(1, 2))
        both = kv[:, :, :, : at.end]
        return both[0], both[1]

    def advance(self, counts: Sequence[int], at: Slots) -> None:
        """Take `counts[i]` of the tokens just written to row i as real; the rest is padding."""
        time = (at.end - at.start) // at.places
        self._used = at.end
        if self._at is None and min(counts) < time:
            self._at = _Paths(self.lengths, self.capacity)
        if self._at is not None:
            self._at.extend(self.lengths, at.starts, counts)
        self.lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        if list(parents) == list(range(len(self.lengths))):
            return
        if self._at is None:
            self._at = _Paths(self.lengths, self.capacity)
            self._squeeze_at = 0
        self._forked |= len(set(parents)) < len(parents)
        self._at.slots = self._at.slots[list(parents)]
        self.lengths = [self.lengths[p] for p in parents]
        self._trees = [self._trees[p] for p in parents]
        kept = sorted(set(self._trees))
        if len(kept) < self.layers[0].shape[1]:
            # Prompts that are done: their memory goes back.
            index = torch.tensor(kept, device=self._device)
            self.layers = [kv[:, index] for kv in self.layers]
            self._trees = [kept.index(tree) for tree in self._trees]
        self._drop_unused()

    def part(self) -> None:
        """Give each row a tree of its own: for rows that go on for long without being forked."""
        if self._at is None:
            return
        longest = max(self.lengths)
        slots = torch.from_numpy(self._at.slots[:, :longest]).to(self._device)
        trees = torch.tensor(self._trees, device=self._device)[:, None]
        for index, kv in enumerate(self.layers):
            new = kv.new_zeros((2, len(slots), *kv.shape[2:]))
            new[:, :, :, :longest] = kv[:, trees, :, slots].permute(2, 0, 3, 1, 4)
            self.layers[index] = new
        self._trees = list(range(len(slots)))
        self._at = _Paths(self.lengths, self.capacity)
        self._drop_unused()

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        if self._at is None and len(set(counts)) > 1:
            self._at = _Paths(self.lengths, self.capacity)
        self.lengths = [have - drop for have, drop in zip(self.lengths, counts, strict=True)]
        self._drop_unused()

    def clear(self) -> None:
        """Forget all tokens and keep the memory."""
        self.lengths = [0] * len(self.lengths)
        self.part()
        self._used = 0
        self._at = None

    def _drop_unused(self) -> None:
        """Take back the slots behind the last one in sight; see whether the mask is needed."""
        if self._at is None:
            self._used = self.lengths[0]
            return
        self._used = self._at.end(self.lengths)
        alone = self._trees == list(range(self.layers[0].shape[1]))
        if alone and all(length == self._used for length in self.lengths):
            self._at = None

    def _seen(
        self, place: list[int], starts: list[int], time: int, places: int, start: int, end: int
    ) -> Tensor:
        """What each query may look at: its row's slots, and of the new ones its own so far.

        (places, time, end) bool. A place without a row looks at one slot, since the softmax of
        nothing is no number.
        """
        assert self._at is not None
        seen = np.zeros((places, time, end), dtype=bool)
        seen[:, :, start] = True
        seen[place, :, start] = False
        seen[place, :, :start] = self._at.seen(self.lengths, start)[:, None]
        so_far = np.tri(time, dtype=bool)
        for one, first in zip(place, starts, strict=True):
            seen[one, :, first : first + time] = so_far
        return torch.from_numpy(seen).to(self._device)

    def _squeeze(self) -> None:
        """Move the slots that rows see together, or part rows that have little in common."""
        assert self._at is not None
        trees = self.layers[0].shape[1]
        used = self._used
        live = np.zeros((trees, used), dtype=bool)
        np.logical_or.at(live, self._trees, self._at.seen(self.lengths, used))
        counts = live.sum(axis=1)
        if not self._forked and counts.max() > _APART * max(self.lengths):
            self.part()
            counts = np.array(self.lengths)
        elif counts.max() < used:
            first = int(live.argmin(axis=1).min())  # all slots before it stay where they are
            kept = np.argsort(~live[:, first:], axis=1, kind="stable")[:, : counts.max() - first]
            index = torch.from_numpy(kept).to(self._device)[:, :, None]
            for kv in self.layers:
                old = kv[:, :, :, first:used]
                moved = index[None, :, None].expand(2, -1, kv.shape[2], -1, kv.shape[4])
                kv[:, :, :, first : first + kept.shape[1]] = old.gather(3, moved)
            self._at.renumber(self.lengths, live.cumsum(axis=1) - 1, self._trees)
            self._drop_unused()
        self._forked = False
        self._squeeze_at = int(counts.max() * 5 // 4) + _ROOM

    def _reserve(self, capacity: int) -> None:
        for index, kv in enumerate(self.layers):
            new = kv.new_zeros((*kv.shape[:3], capacity, kv.shape[4]))
            new[..., : self._used, :] = kv[..., : self._used, :]
            self.layers[index] = new


_ROOM = 64
"""Slots out of sight that are worth no squeeze: attention over as many takes microseconds."""
_APART = 4
"""Rows without a fork get trees of their own when together they see so many times a row's slots."""


class _Paths:
    """The slot of each token of each row, on the host: (rows, capacity) int64, ascending."""

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self.slots = np.broadcast_to(np.arange(capacity), (len(lengths), capacity)).copy()

    def extend(self, lengths: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        longest = max(have + new for have, new in zip(lengths, counts, strict=True))
        if longest > self.slots.shape[1]:
            self.slots = np.pad(self.slots, ((0, 0), (0, longest)))
        for slots, have, start, new in zip(self.slots, lengths, starts, counts, strict=True):
            slots[have : have + new] = range(start, start + new)

    def end(self, lengths: Sequence[int]) -> int:
        """One past the last slot that a row sees."""
        last = [row[length - 1] for row, length in zip(self.slots, lengths, strict=True) if length]
        return int(max(last, default=-1)) + 1

    def seen(self, lengths: Sequence[int], end: int) -> np.ndarray:
        """(rows, end) bool: the slots that each row sees."""
        seen = np.zeros((len(lengths), end), dtype=bool)
        for row, length in enumerate(lengths):
            seen[row, self.slots[row, :length]] = True
        return seen

    def renumber(self, lengths: Sequence[int], to: np.ndarray, trees: Sequence[int]) -> None:
        """Slot i of a tree is now to[tree, i]."""
        for row, (length, tree) in enumerate(zip(lengths, trees, strict=True)):
            self.slots[row, :length] = to[tree, self.slots[row, :length]]


def _places(trees: Sequence[int], count: int) -> tuple[list[int], int]:
    """For each row tree · places + place, and how many places the fullest of `count` trees has."""
    have = [0] * count
    place = []
    for tree in trees:
        place.append(have[tree])
        have[tree] += 1
    places = max(have)
    return [tree * places + at for tree, at in zip(trees, place, strict=True)], places
