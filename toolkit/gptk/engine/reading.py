"""What runs wait for: tokens to be read, and logits to be computed from states."""

from array import array
from collections.abc import Collection, Sequence
from operator import lt
from typing import NamedTuple

import torch
from torch import Tensor

from gptk.kernels import BLOCK
from gptk.model.blocks import BlockCache
from gptk.model.joined import Part
from gptk.model.pool import BlockPool


class LogitsWanted(NamedTuple):
    """Next-token logits of these states, (…, width)."""

    states: Tensor


class _Row:
    """What is to be read of a row, in several passes if it is long."""

    __slots__ = ("states", "unread", "wanted")

    def __init__(self, unread: "array[int]", wanted: int) -> None:
        """wanted: how many of its last tokens the run wants the states of."""
        self.unread, self.wanted = unread, wanted
        self.states: list[Tensor] = []
        """(1, tokens, 1 + layers, width) of each pass that had some of these."""


class Reading:
    """Tokens that a run wants read after what a cache holds of its rows.

    ids, counts, layers: as in `CausalModel.states`. wanted: how many of each row's tokens, the last
    ones, the states are asked of [all]. with_logits: the run wants the logits of these, too. Where
    blocks were taken from the cache, the tokens that they held are read again first.
    """

    __slots__ = (
        "_before",
        "_rows",
        "_time",
        "_tokens",
        "_wanted",
        "asked",
        "cache",
        "layers",
        "size",
        "with_logits",
    )

    def __init__(
        self,
        ids: Tensor,
        cache: BlockCache,
        counts: list[int] | None,
        layers: Collection[int],
        wanted: int | None = None,
        with_logits: bool = False,
    ) -> None:
        self._wanted, self.with_logits = wanted, with_logits
        self.cache, self.layers = cache, tuple(layers)
        self._before = list(cache.lengths)
        rows, time = ids.tolist(), ids.shape[1]
        if counts is not None:
            rows = [row[:count] for row, count in zip(rows, counts, strict=True)]
        self._time = time
        self.asked = len(rows), time if wanted is None else wanted
        """Of how many rows the states of how many tokens each; not for rows with `counts`."""
        self._tokens = [array("q", row) for row in rows]
        self.start_again()

    def start_again(self) -> None:
        """Read all, as when the cache has lost its blocks."""
        self._rows: list[_Row] | None = None
        self.size = sum(map(len, self._tokens))
        """How many tokens are still to be read: at most, as long as none of them is."""
        if self.is_lost:
            self.size += sum(self._before) - sum(map(min, self.cache.held, self._before))

    @property
    def is_lost(self) -> bool:
        """Whether blocks were taken from the cache since its rows were read."""
        held = self.cache.held
        return held != self._before and any(map(lt, held, self._before))

    @property
    def blocks(self) -> int:
        """About how many blocks the cache's rows will have after this."""
        return sum(length // BLOCK + 2 for length in self._before) + len(self._tokens[0]) // BLOCK

    def parts(self, room: int) -> list[Part]:
        """Up to `room` of its tokens, for a pass."""
        parts = []
        for number, row in enumerate(self._rows or self._open()):
            count = min(room, len(row.unread))
            if count > 0:
                room -= count
                left = len(row.unread) - count
                tokens = row.unread[:count] if left else row.unread
                wanted = min(max(row.wanted - left, 0), count)
                parts.append(Part(self.cache, number, tokens, wanted))
        return parts

    def took(self, part: Part, states: Tensor) -> None:
        """A pass has read a part of it. states: of the tokens that are wanted, (1, …, 1 + layers,
        width)."""
        assert self._rows is not None
        row = self._rows[part.row]
        row.unread = row.unread[len(part.tokens) :]
        self.size -= len(part.tokens)
        if part.wanted:
            row.states.append(states)

    def use(self, pool: BlockPool) -> None:
        """Read with this pool, which is another one after the model was converted."""
        if self.cache.pool is not pool:
            self.cache.move(pool)
            self.start_again()

    def result(self) -> Tensor | None:
        """(rows, time, 1 + layers, width), once all is read."""
        rows = self._rows or self._open()
        for row in rows:
            if row.unread:
                return None
        each = [row.states[0] if len(row.states) == 1 else torch.cat(row.states, 1) for row in rows]
        if len(rows) == 1:
            return each[0]
        if all(states.shape[1] == self._time for states in each):
            return torch.cat(each)
        padded = each[0].new_zeros(len(rows), self._time, *each[0].shape[2:])
        for row, states in zip(padded, each, strict=True):
            row[: states.shape[1]] = states[0]
        return padded

    def _open(self) -> Sequence[_Row]:
        if self._rows is None:
            self._rows = []
            cache = self.cache
            for number, (tokens, before) in enumerate(zip(self._tokens, self._before, strict=True)):
                unread = tokens
                if not cache.held[number] == cache.lengths[number] == before:
                    cache.shorten(number, before)
                    cache.recover(number)
                    unread = cache.unread(number) + tokens
                wanted = len(tokens) if self._wanted is None else self._wanted
                self._rows.append(_Row(unread, wanted))
            self.size = sum(len(row.unread) for row in self._rows)
        return self._rows
