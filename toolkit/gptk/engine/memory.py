"""The memory of an engine: which runs hold keys and values, of any model, and who gives them back.

Where memory is short, what no run holds goes first (see gptk.model.budget), then what the newest
runs hold: they are set back, and read their texts again when there is room.
"""

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from gptk.engine.reading import Reading
from gptk.engine.run import Run
from gptk.model.blocks import BlockCache
from gptk.model.budget import Budget


@dataclass(slots=True)
class Use:
    """Of a cache."""

    number: int
    """Of the run that used it first, or its age: the lower, the later it is set back."""
    order: int
    """Counts all caches."""
    last: "weakref.ref[Run[Any]]"
    """The run that used it last."""

    @property
    def run(self) -> Run[Any] | None:
        """The run that uses it, if this is under way."""
        run = self.last()
        return None if run is None or run.has_ended else run


@dataclass(slots=True)
class Memory:
    """A budget for each device, and the use of all caches in blocks."""

    _budgets: dict[torch.device, Budget] = field(default_factory=dict)
    _uses: "weakref.WeakKeyDictionary[BlockCache, Use]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _orders: "itertools.count[int]" = field(default_factory=itertools.count)

    def budget(self, device: torch.device) -> Budget:
        """What the blocks of all models on a device take together."""
        return self._budgets.setdefault(device, Budget(device))

    def use(self, cache: BlockCache, run: Run[Any]) -> None:
        """A run reads with a cache. It is as old as the run that did so first: the steps of a
        stream, each of which is a run, are not newer than what began after the stream."""
        run.cache = cache
        use = self._uses.get(cache)
        if use is None:
            self._uses[cache] = Use(run.number, next(self._orders), weakref.ref(run))
        elif use.last() is not run:
            use.last = weakref.ref(run)
            run.number = min(run.number, use.number)

    def set_back(self, run: Run[Any], budget: Budget) -> tuple[BlockCache, Run[Any] | None] | None:
        """Take the blocks of the newest cache that neither this run uses nor an older one under
        way. Returns the cache and the run that uses it; None if there is none."""
        held = [
            (use.number, use.order, cache)
            for cache, use in list(self._uses.items())
            if cache.has_blocks
            and cache.pool.budget is budget
            and (use.run is None or use.run.number > run.number)
        ]
        if not held:
            return None
        cache = max(held, key=lambda each: each[:2])[2]
        cache.drop()
        user = self._uses[cache].run
        if user is not None and isinstance(user.wanted, Reading) and user.wanted.cache is cache:
            user.wanted.start_again()
        return cache, user

    def release(self, run: Run[Any]) -> None:
        """Give back what a run has used that failed: its error may keep its caches."""
        for cache, use in list(self._uses.items()):
            if use.last() is run:
                cache.drop()

    def is_oldest(self, run: Run[Any], budget: Budget) -> bool:
        """Whether no older run under way holds blocks."""
        return not any(
            use.run is not None and use.run.number < run.number
            for cache, use in list(self._uses.items())
            if cache.pool.budget is budget and cache.has_blocks
        )
