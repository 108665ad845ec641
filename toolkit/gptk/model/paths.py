"""The path of each row through its tree of slots, see gptk.model.cache: what a row sees."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Paths:
    """For each row the slots of its tokens."""

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


def tree_index_of(trees: Sequence[int], count: int) -> tuple[list[int], int]:
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
