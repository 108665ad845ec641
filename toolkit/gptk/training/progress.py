"""How far a training run is: the numbers that every checkpoint holds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptk.runs.checkpoints import SavedProgress


@dataclass
class TrainingProgress:
    """The counters of a run, and its best evaluation."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Passes over the training data that are complete."""
    position: int = 0
    """Training windows taken in the current epoch."""
    tokens: int = 0
    """Tokens seen in all epochs."""
    best_loss: float = math.inf
    """The lowest validation loss so far (of the averaged weights, if weights are averaged)."""
    best_step: int | None = None
    """The step of the lowest validation loss."""
    evaluations_since_best: int = 0
    data_sums: list[str] | None = None
    """The SHA-256 of each token file that the run reads; None for windows made by the caller."""

    def note_validation_loss(self, loss: float) -> bool:
        """Count an evaluation after step 0. Returns whether its loss is the best so far."""
        if self.step and loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.evaluations_since_best = 0
            return True
        self.evaluations_since_best += 1 if self.step else 0
        return False

    def saved(
        self, processes: int, settings: Mapping[str, Any], tensors: Mapping[str, str]
    ) -> SavedProgress:
        """The counters and what goes with them, as a checkpoint keeps them.

        processes: how many train. settings: as JSON. tensors: dtype and shape of each.
        """
        return SavedProgress(
            step=self.step,
            epoch=self.epoch,
            position=self.position,
            tokens=self.tokens,
            best_step=self.best_step,
            best_loss=None if self.best_step is None else self.best_loss,
            evaluations_since_best=self.evaluations_since_best,
            processes=processes,
            data=self.data_sums,
            settings=dict(settings),
            tensors=dict(tensors),
        )

    def restore(self, saved: SavedProgress) -> None:
        """Restore the counters that `saved` returned."""
        self.step, self.epoch = saved.step, saved.epoch
        self.position, self.tokens = saved.position, saved.tokens
        self.best_step = saved.best_step
        self.best_loss = math.inf if saved.best_loss is None else saved.best_loss
        self.evaluations_since_best = saved.evaluations_since_best
