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
    """What a step learns from."""

    epoch: int
    position: int
    """Windows taken in this epoch before the step."""
    windows: np.ndarray
    """The indices of the step's windows, in all processes."""
    local_windows: np.ndarray
    """The indices of the windows that this process takes."""
    batches: list[Batch]
    """The tokens of `local_windows`, in order; in pinned memory if the loader has `pin`."""


class StepLoader:
    """The data of any step, a pure function of the epoch and the position where it begins.

    So data prepared ahead is not part of the state: a run that is resumed, or moved to another
    position in the data, gets the same batches. step_windows: windows in a step, in all processes;
    process `rank` of `count` takes every count-th. pin: put batches into pinned memory, for a GPU.
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
        self.windows = windows
        self._step_windows, self._batch_size = step_windows, batch_size
        self._fewest_windows = step_windows if drop_last else 1
        self._rank, self._count, self._pin = rank, count, pin
        n = len(windows)
        self._order_of: Callable[[int], np.ndarray] = lambda epoch: epoch_order(
            n, seed=seed, epoch=epoch, shuffle=shuffle
        )
        self._order = (-1, np.empty(0, np.int64))
        """An epoch, and the order of its windows."""
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[int, int], Future[StepData]] | None = None
        """The epoch and position of the step that is being prepared, and its data."""

    def take(self, epoch: int, position: int) -> StepData:
        """The data of the step at a position, or of the next epoch's first if this epoch is over.

        Meanwhile a thread prepares the data of the step that follows.
        """
        ahead, self._ahead = self._ahead, None
        prepared = ahead[1].result() if ahead is not None else None  # also waits for the thread
        if ahead is None or prepared is None or ahead[0] != (epoch, position):
            prepared = self._prepare(epoch, position)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "gptk-data")
        following = prepared.epoch, prepared.position + len(prepared.windows)
        self._ahead = following, self._worker.submit(self._prepare, *following)
        return prepared

    def close(self) -> None:
        """End the thread; the next `take` starts another."""
        self._ahead = None
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _prepare(self, epoch: int, position: int) -> StepData:
        if len(self.windows) - position < self._fewest_windows:
            epoch, position = epoch + 1, 0
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        windows = self._order[1][position : position + self._step_windows]
        local = windows[self._rank :: self._count]
        size = self._batch_size
        batches = [self.windows.batch(local[i : i + size]) for i in range(0, len(local), size)]
        if self._pin:
            batches = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches]
        return StepData(epoch, position, windows, local, batches)
