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

import functools
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
    group: int
    """Query heads that share keys."""
    trees: int
    places: int
    """How many rows a tree has room for in this pass."""
    order: Tensor | None
    """(rows,): for each row tree · places + place; None where that is the row's own number."""
    starts: list[int]
    """For each row the first slot written."""
    mask: Tensor | None
    """(1 or trees, places · time, end), of the model's dtype, added to the scores of all heads:
    0 where a query may look, -inf elsewhere. None: all is visible."""
    causal: bool
    """Queries and keys are the same tokens: plain causal attention."""
    plain: bool
    """One token a tree, row by row."""
    slots: tuple[Tensor, ...]
    """For each layer the slots written, (2, trees, kv_heads, places, time, head_dim), or where
    `plain` without places."""
    keys: tuple[Tensor, ...]
    """For each layer all keys up to `end`, (trees · kv_heads, 1, end, head_dim)."""
    values: tuple[Tensor, ...]

    @functools.cached_property
    def mask_of_heads(self) -> Tensor | None:
        """The mask as (1 or trees · kv_heads, 1, group · places · time, end)."""
        if self.mask is None:
            return None
        mask = self.mask.repeat(1, self.group, 1) if self.group > 1 else self.mask
        kv_heads = len(self.keys[0]) // self.trees
        mask = mask.repeat_interleave(kv_heads, dim=0) if len(mask) > 1 else mask
        return mask[:, None]

    def write(self, layer: int, new: Tensor) -> None:
        """Store a layer's new keys and values, (rows, time, 2, kv_heads, head_dim)."""
        if self.plain:
            self.slots[layer].copy_(new.permute(2, 0, 3, 1, 4))
        else:
            self.slots[layer].copy_(self.by_tree(new).permute(3, 0, 4, 1, 2, 5))

    def by_tree(self, x: Tensor) -> Tensor:
        """(rows, …) as (trees, places, …), with zeros for no row."""
        if self.order is not None:
            full = x.new_zeros((self.trees * self.places, *x.shape[1:]))
            x = full.index_copy_(0, self.order, x)
        return x.view(self.trees, self.places, *x.shape[1:])

    def by_row(self, y: Tensor) -> Tensor:
        """(trees · places, …) as (rows, …)."""
        return y if self.order is None else y[self.order]


class KVCache:
    """Keys and values of `n_layers` layers for a changing set of rows.

    One tensor, (n_layers, 2, trees, kv_heads, capacity, head_dim): keys, then values. At first
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
        shape = (n_layers, 2, rows, n_kv_heads, capacity, head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows
        """Tokens held for each row."""
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
        return self.kv.shape[4]

    @property
    def is_plain(self) -> bool:
        """Each row has a tree of its own without gaps, and all are of a length."""
        return self._at is None and len(set(self.lengths)) == 1

    def plan(self, time: int, group: int = 1) -> Slots:
        """The slots for `time` new tokens on every row; makes room for them.

        group: query heads that share keys. Lengths move on in `advance`, once the pass is made.
        """
        device, lengths = self.kv.device, self.lengths
        longest, shortest = max(lengths), min(lengths)
        if self._at is not None and self._used >= self._squeeze_at:
            self._squeeze()
        trees = self.kv.shape[2]
        place, places = _places(self._trees, trees)
        start, end = self._used, self._used + places * time
        starts = [start + time * (one % places) for one in place]
        if end > self.capacity:
            self.reserve(max(end + end // 4, 2 * self.capacity))
        steps = torch.arange(time, device=device)
        if longest == shortest:
            positions = (steps + longest)[None]
        else:
            positions = torch.tensor(lengths, device=device)[:, None] + steps
        causal = longest == 0 and time > 1
        mask = None
        if not causal and self._at is not None:
            mask = self._at.mask(place, trees * places, starts, start, end, time)
            mask = mask.view(trees, places * time, end)
        elif not causal and time > 1:
            seen = torch.arange(end, device=device) <= (steps + start)[:, None]
            mask = self.kv.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None]
        in_order = place == list(range(trees * places))
        order = None if in_order else torch.tensor(place, device=device)
        plain = in_order and places == time == 1
        slots = self.kv.narrow(4, start, end - start)
        if not plain:
            slots = slots.view(*slots.shape[:4], places, time, -1)
        keys, values = self.kv.flatten(2, 3)[:, :, :, None, :end].unbind(1)
        return Slots(
            positions=positions,
            start=start,
            end=end,
            group=group,
            trees=trees,
            places=places,
            order=order,
            starts=starts,
            mask=mask,
            causal=causal,
            plain=plain,
            slots=slots.unbind(),
            keys=keys.unbind(),
            values=values.unbind(),
        )

    def advance(self, counts: Sequence[int], at: Slots) -> None:
        """Take `counts[i]` of the tokens just written to row i as real; the rest is padding."""
        time = (at.end - at.start) // at.places
        self._used = at.end
        padded = min(counts) < time
        if self._at is None and padded:
            self._at = _Paths(self.lengths, self.kv)
        if self._at is not None:
            self._at.extend(self.lengths, at.starts, counts)
        self.lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        if self._at is not None and (padded or at.mask is None):
            self._at.show(self.lengths)

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        if list(parents) == list(range(len(self.lengths))):
            return
        if self._at is None:
            self._at = _Paths(self.lengths, self.kv)
            self._squeeze_at = 0
        self._forked |= len(set(parents)) < len(parents)
        self._at.select(parents)
        self.lengths = [self.lengths[p] for p in parents]
        self._trees = [self._trees[p] for p in parents]
        kept = sorted(set(self._trees))
        if len(kept) < self.kv.shape[2]:
            # Prompts that are done: their memory goes back.
            self.kv = self.kv[:, :, torch.tensor(kept, device=self.kv.device)]
            self._trees = [kept.index(tree) for tree in self._trees]
        self._drop_unused()

    def part(self) -> None:
        """Give each row a tree of its own: for rows that go on for long without being forked."""
        if self._at is None:
            return
        longest = max(self.lengths)
        slots = torch.from_numpy(self._at.slots[:, :longest]).to(self.kv.device)
        n_layers, _, _, *rest = self.kv.shape
        new = self.kv.new_zeros((n_layers, 2, len(slots), *rest))
        for row, tree in enumerate(self._trees):
            new[:, :, row, :, :longest] = self.kv[:, :, tree].index_select(3, slots[row])
        self.kv = new
        self._trees = list(range(len(slots)))
        self._at = _Paths(self.lengths, self.kv)
        self._drop_unused()

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        if self._at is None and len(set(counts)) > 1:
            self._at = _Paths(self.lengths, self.kv)
        if self._at is not None:
            self._at.rewind(self.lengths, counts)
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
        alone = self._trees == list(range(self.kv.shape[2]))
        if alone and all(length == self._used for length in self.lengths):
            self._at = None

    def _squeeze(self) -> None:
        """Move the slots that rows see together, or part rows that have little in common."""
        assert self._at is not None
        used = self._used
        live = np.zeros((self.kv.shape[2], used), dtype=bool)
        for tree, slots, length in zip(self._trees, self._at.slots, self.lengths, strict=True):
            live[tree, slots[:length]] = True
        counts = live.sum(axis=1)
        if not self._forked and counts.max() > _APART * max(self.lengths):
            self.part()
            counts = np.array(self.lengths)
        elif counts.max() < used:
            first = int(live.argmin(axis=1).min())  # all slots before it stay where they are
            kept = np.argsort(~live[:, first:], axis=1, kind="stable")[:, : counts.max() - first]
            for tree, moved in enumerate(torch.from_numpy(kept).to(self.kv.device)):
                slots = self.kv[:, :, tree, :, first:used]
                slots[:, :, :, : len(moved)] = slots.index_select(3, moved)
            self._at.renumber(self.lengths, live.cumsum(axis=1) - 1, self._trees)
            self._drop_unused()
        self._forked = False
        self._squeeze_at = int(counts.max() * 5 // 4) + _ROOM

    def reserve(self, capacity: int) -> None:
        """Have memory for so many slots in each tree."""
        *shape, _, head_dim = self.kv.shape
        new = self.kv.new_zeros((*shape, capacity, head_dim))
        new[..., : self._used, :] = self.kv[..., : self._used, :]
        self.kv = new
        if self._at is not None:
            self._at.reserve(capacity)


_ROOM = 64
"""Slots out of sight that are worth no squeeze: attention over as many takes microseconds."""
_APART = 4
"""Rows without a fork get trees of their own when together they see so many times a row's slots."""


class _Paths:
    """Where the tokens of each row are, and what it may look at."""

    def __init__(self, lengths: Sequence[int], kv: Tensor) -> None:
        capacity = kv.shape[4]
        self.slots = np.broadcast_to(np.arange(capacity), (len(lengths), capacity)).copy()
        """(rows, capacity) int64, on the host: the slot of each token, in ascending order."""
        self._bias = kv.new_empty(len(lengths), capacity)
        """0 for slots that a row may look at, -inf for others."""
        self.show(lengths)

    def mask(
        self, place: Sequence[int], places: int, starts: list[int], start: int, end: int, time: int
    ) -> Tensor:
        """What each query may look at: its row's slots, and of the new ones its own so far.

        place: for each row which of the `places` it has. Returns (places · time, end).
        """
        own = torch.tensor(starts, device=self._bias.device)[:, None]
        new = torch.arange(start, end, device=own.device)
        last = own + time  # what the last query sees; in the end what the row does
        self._bias[:, start:end] = self._additive((new >= own) & (new < last))
        rows = self._bias[:, None, :end]
        if time > 1:
            rows = rows.repeat(1, time, 1)
            for query in range(time):
                rows[:, query, start:end] = self._additive((new >= own) & (new <= own + query))
        if list(place) != list(range(places)):
            # A place without a row looks at all there is: the softmax of nothing is no number.
            full = rows.new_zeros(places, time, end)
            rows = full.index_copy_(0, torch.tensor(place, device=rows.device), rows)
        return rows.reshape(-1, end)

    def extend(self, lengths: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Row i has got counts[i] tokens in the slots from starts[i] on."""
        longest = max(have + new for have, new in zip(lengths, counts, strict=True))
        if longest > self.slots.shape[1]:
            self.slots = np.pad(self.slots, ((0, 0), (0, longest)))
        for slots, have, start, new in zip(self.slots, lengths, starts, counts, strict=True):
            slots[have : have + new] = range(start, start + new)

    def select(self, parents: Sequence[int]) -> None:
        self.slots = self.slots[list(parents)]
        self._bias = self._bias[torch.tensor(parents, device=self._bias.device)]

    def rewind(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            if count:
                dropped = torch.from_numpy(self.slots[row, length - count : length])
                self._bias[row, dropped.to(self._bias.device)] = -torch.inf

    def end(self, lengths: Sequence[int]) -> int:
        """One past the last slot that a row sees."""
        last = [row[length - 1] for row, length in zip(self.slots, lengths, strict=True) if length]
        return int(max(last, default=-1)) + 1

    def renumber(self, lengths: Sequence[int], to: np.ndarray, trees: Sequence[int]) -> None:
        """Slot i of a tree is now to[tree, i]."""
        for row, (length, tree) in enumerate(zip(lengths, trees, strict=True)):
            self.slots[row, :length] = to[tree, self.slots[row, :length]]
        self.show(lengths)

    def reserve(self, capacity: int) -> None:
        """Have room for so many slots."""
        more = self._bias.new_full((len(self._bias), capacity - self._bias.shape[1]), -torch.inf)
        self._bias = torch.cat((self._bias, more), dim=1)

    def show(self, lengths: Sequence[int]) -> None:
        """Have the mask of what rows may look at say what `slots` does."""
        seen = np.zeros(self._bias.shape, dtype=bool)
        for row, length in enumerate(lengths):
            seen[row, self.slots[row, :length]] = True
        self._bias = self._additive(torch.from_numpy(seen).to(self._bias.device))

    def _additive(self, seen: Tensor) -> Tensor:
        return self._bias.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _places(trees: Sequence[int], count: int) -> tuple[list[int], int]:
    """For each row tree · places + place, and how many places the fullest of `count` trees has."""
    have = [0] * count
    place = []
    for tree in trees:
        place.append(have[tree])
        have[tree] += 1
    places = max(have)
    return [tree * places + at for tree, at in zip(trees, place, strict=True)], places
