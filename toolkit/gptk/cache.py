"""The KV cache: keys and values of every layer, with each row at its own length.

Rows start at slot 0, so that a row's slot is its position. Slots past a row's length hold
leftovers that attention never sees; they must be finite, as a masked weight of zero times
infinity is not zero. Memory is reserved ahead and doubles when it runs out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Where one forward pass writes and what it may see; made once, used by every layer."""

    positions: Tensor
    """(1 or rows, time): the position of each new token."""
    start: int | None
    """The first slot written, where all rows stand at the same length; else None."""
    end: int
    """One past the last slot that any row uses after this pass."""
    mask: Tensor | None
    """(1 or rows, 1, time, end), True where a query may look; None: all it needs no mask."""
    causal: bool
    """Queries and keys are the same tokens: plain causal attention."""


class KVCache:
    """Keys and values of `n_layers` layers for a changing set of rows.

    Each layer is one tensor (2, rows, kv_heads, capacity, head_dim): keys, then values.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        rows: int,
        capacity: int,
        max_capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (2, rows, n_kv_heads, capacity, head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self._max_capacity = max_capacity
        self.lengths = [0] * rows
        """Tokens held for each row."""

    @property
    def capacity(self) -> int:
        return self.layers[0].shape[3]

    def plan(self, time: int) -> Slots:
        """The slots for `time` new tokens on every row; makes room for them."""
        longest, shortest = max(self.lengths), min(self.lengths)
        end = longest + time
        if end > self.capacity:
            self._reserve(max(end, min(2 * self.capacity, self._max_capacity)))
        device = self.layers[0].device
        steps = torch.arange(time, device=device)
        if longest == shortest:
            positions = (steps + longest)[None]
            mask = None
            if longest and time > 1:
                mask = torch.arange(end, device=device) <= positions[:, :, None]
        else:
            positions = torch.tensor(self.lengths, device=device)[:, None] + steps
            mask = torch.arange(end, device=device) <= positions[:, :, None]
        return Slots(
            positions=positions,
            start=longest if longest == shortest else None,
            end=end,
            mask=None if mask is None else mask[:, None],
            causal=not longest and time > 1,
        )

    def write(self, layer: int, keys: Tensor, values: Tensor, at: Slots) -> tuple[Tensor, Tensor]:
        """Store new keys and values, both (rows, kv_heads, time, head_dim).

        Returns all keys and values up to `at.end`. Lengths move on in `advance`, once a pass.
        """
        kv = self.layers[layer]
        if at.start is not None:
            kv[0, :, :, at.start : at.end].copy_(keys)
            kv[1, :, :, at.start : at.end].copy_(values)
        else:
            rows = torch.arange(kv.shape[1], device=kv.device)[:, None]
            kv[0].transpose(1, 2)[rows, at.positions] = keys.transpose(1, 2)
            kv[1].transpose(1, 2)[rows, at.positions] = values.transpose(1, 2)
        return kv[0, :, :, : at.end], kv[1, :, :, : at.end]

    def advance(self, counts: Sequence[int]) -> None:
        """Take `counts[i]` of the tokens just written to row i as real; the rest is padding."""
        self.lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        used = max((self.lengths[p] for p in parents), default=0)
        moved = [i for i, parent in enumerate(parents) if i != parent]
        rows = self.layers[0].shape[1]
        self.lengths = [self.lengths[p] for p in parents]
        if len(parents) == rows and moved:
            # Beams mostly stay where they are: copy only the rows that change.
            to = torch.tensor(moved, device=self.layers[0].device)
            source = torch.tensor([parents[i] for i in moved], device=to.device)
            for kv in self.layers:
                kv[:, to, :, :used] = kv[:, source, :, :used]
        elif moved or len(parents) < rows:
            source = torch.tensor(parents, device=self.layers[0].device)
            for index, kv in enumerate(self.layers):
                new = kv.new_zeros((2, len(parents), *kv.shape[2:]))
                new[..., :used, :] = kv[:, source, :, :used]
                self.layers[index] = new

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        self.lengths = [have - drop for have, drop in zip(self.lengths, counts, strict=True)]

    def clear(self) -> None:
        """Forget all tokens and keep the memory."""
        self.lengths = [0] * len(self.lengths)

    def _reserve(self, capacity: int) -> None:
        used = max(self.lengths)
        for index, kv in enumerate(self.layers):
            new = kv.new_zeros((*kv.shape[:3], capacity, kv.shape[4]))
            new[..., :used, :] = kv[..., :used, :]
            self.layers[index] = new
