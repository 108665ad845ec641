"""The budget: the memory that the blocks of all models on a device share."""

import threading
import weakref
from collections.abc import Iterable
from operator import itemgetter
from typing import Protocol

import torch

from gptk.system.kv_memory import Amount, kv_memory
from gptk.system.memory import available_memory


class Pool(Protocol):
    """Blocks of a model, in slabs."""

    taken: int
    """Bytes of all slabs."""

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab."""
        raise NotImplementedError

    @property
    def idle(self) -> int:
        """Bytes of the slabs of which no row has a block."""
        raise NotImplementedError

    def idle_slabs(self) -> Iterable[tuple[int, int]]:
        """These slabs: the moment when a row had a block of it last, its number."""
        raise NotImplementedError

    def give_back(self, slab: int) -> None:
        """Forget what an idle slab holds, and give its memory back."""
        raise NotImplementedError


class Budget:
    """Bytes that the pools of a device may take together; see `gptk.set_kv_memory`.

    A pool of a model that is no more counts no more. All methods are for one thread, but `add`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._amount: Amount | None = None
        self._limit = 0

    def add(self, pool: Pool) -> None:
        """A pool takes its memory from here from now on."""
        with self._lock:
            self._pools.add(pool)

    @property
    def limit(self) -> int:
        """Bytes."""
        amount = kv_memory()
        if amount != self._amount:
            free = available_memory(self._device) + self.taken if amount.is_share else 0
            self._amount, self._limit = amount, amount.bytes_of(free)
        return self._limit

    @property
    def taken(self) -> int:
        """Bytes that the slabs of all pools take."""
        return sum(pool.taken for pool in self._all())

    def within_reach(self, pool: Pool) -> int:
        """Bytes that a pool can take of what is left, and of what rows of others do not have."""
        idle = sum(each.idle for each in self._all() if each is not pool)
        return max(0, self.limit - self.taken + idle)

    def make_room(self, pool: Pool, unused_since: float = float("inf")) -> bool:
        """Whether a pool may take another slab, others having given back slabs for it.

        They give back those that have not been used for the longest time, and none that was used
        after `unused_since`; if that does not suffice, none at all.
        """
        missing = self.taken + pool.slab_bytes - self.limit
        idle = [
            (moment, each, slab)
            for each in self._all()
            if each is not pool and missing > 0
            for moment, slab in each.idle_slabs()
            if moment < unused_since
        ]
        chosen = []
        for _, each, slab in sorted(idle, key=itemgetter(0)):
            if missing <= 0:
                break
            chosen.append((each, slab))
            missing -= each.slab_bytes
        if missing > 0:
            return False
        for each, slab in chosen:
            each.give_back(slab)
        return True

    def trim(self) -> None:
        """Give back what is beyond the limit and not in use."""
        excess = self.taken - self.limit
        if excess <= 0:
            return
        idle = [(moment, pool, slab) for pool in self._all() for moment, slab in pool.idle_slabs()]
        for _, pool, slab in sorted(idle, key=itemgetter(0)):
            if excess > 0:
                pool.give_back(slab)
                excess -= pool.slab_bytes

    def _all(self) -> list[Pool]:
        with self._lock:
            return list(self._pools)
