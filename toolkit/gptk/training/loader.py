"""Which windows a step takes, and their tokens, prepared while the step before it runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gptk.data.windows import Windows, epoch_order

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, (windows, time) each."""


@dataclass(frozen=True)
class StepData:
    """What one step learns from."""

    epoch: int
    position: int
    """Windows taken in this epoch before the step."""
    windows: np.ndarray
    """Of all processes."""
    mine: np.ndarray
    """Those of this process."""
    batches: list[Batch]
    """Of `mine`, in order, in the memory that the device copies from fastest."""


class StepLoader:
    """The data of any step, a pure function of the epoch and the position that it begins at.

    So what is prepared ahead is no state: a run that is resumed, or moved to another place in the
    data, gets the same. step_windows: how many a step takes, in all processes; `rank` of `count`
    takes every count-th. pin: put batches into pinned memory, for a GPU.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        step_windows: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int = 0,
        count: int = 1,
        pin: bool = False,
    ) -> None:
        self._windows = windows
        self._step_windows, self._batch_size = step_windows, batch_size
        self._least = step_windows if drop_last else 1
        self._rank, self._count, self._pin = rank, count, pin
        n = len(windows)
        self._order_of: Callable[[int], np.ndarray] = lambda epoch: epoch_order(
            n, seed=seed, epoch=epoch, shuffle=shuffle
        )
        self._order = (-1, np.empty(0, np.int64))
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[int, int], Future[StepData]] | None = None

    def take(self, epoch: int, position: int) -> StepData:
        """The data of the step that begins there, or with the next epoch if this one is over.

        Meanwhile the data of the step that follows is prepared in a thread.
        """
        ahead, self._ahead = self._ahead, None
        prepared = ahead[1].result() if ahead is not None else None  # the thread's work is over
        if ahead is None or prepared is None or ahead[0] != (epoch, position):
            prepared = self._prepare(epoch, position)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "gptk-data")
        following = prepared.epoch, prepared.position + len(prepared.windows)
        self._ahead = following, self._worker.submit(self._prepare, *following)
        return prepared

    def close(self) -> None:
        """End the thread; `take` would begin another."""
        self._ahead = None
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _prepare(self, epoch: int, position: int) -> StepData:
        if len(self._windows) - position < self._least:
            epoch, position = epoch + 1, 0
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        windows = self._order[1][position : position + self._step_windows]
        mine = windows[self._rank :: self._count]
        size = self._batch_size
        batches = [self._windows.batch(mine[at : at + size]) for at in range(0, len(mine), size)]
        if self._pin:
            batches = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches]
        return StepData(epoch, position, windows, mine, batches)
