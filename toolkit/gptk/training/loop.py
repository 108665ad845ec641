"""The training loop: steps, with records, evaluations, samples and checkpoints when due."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gptk.training.config import TrainConfig
from gptk.training.progress import TrainingProgress

Ending = Literal["finished", "patience", "interrupted"]


@dataclass(frozen=True)
class TrainingLoop:
    """Takes steps until the last one, until it is stopped, or until patience runs out."""

    config: TrainConfig
    progress: TrainingProgress
    total_steps: int
    take_step: Callable[[], dict[str, Any]]
    evaluate: Callable[[], dict[str, Any]]
    sample: Callable[[], dict[str, Any]] | None
    save: Callable[[], object]
    tell: Callable[[dict[str, Any]], None]
    """Called with each record of a step, an evaluation or a sample."""
    stop_asked: Callable[[], bool]
    """Whether to end after the present step; all processes must answer the same."""

    def run(self) -> Ending:
        progress, config = self.progress, self.config
        save_every = config.save_every or config.eval_every
        seconds, tokens = 0.0, progress.tokens  # since the last record with a speed
        if progress.step == 0:
            self._evaluate()
        if self._out_of_patience:
            return "patience"
        while progress.step < self.total_steps:
            start = time.perf_counter()
            record = self.take_step()
            seconds += time.perf_counter() - start
            interrupted = self.stop_asked()
            done = progress.step == self.total_steps
            if interrupted or done or progress.step % config.log_every == 0:
                record["tokens_per_second"] = (progress.tokens - tokens) / seconds
                seconds, tokens = 0.0, progress.tokens
            if "tokens_per_second" in record or "skipped" in record:
                self.tell(record)
            due = done or progress.step % config.eval_every == 0
            better = due and self._evaluate()
            over = interrupted or done or self._out_of_patience
            if over or better or progress.step % save_every == 0:
                self.save()
            if over:
                return "finished" if done else "interrupted" if interrupted else "patience"
        return "finished"

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _evaluate(self) -> bool:
        """Evaluate and sample. Returns whether the validation loss is the best so far."""
        record = self.evaluate()
        self.tell(record)
        if self.sample is not None:
            self.tell(self.sample())
        loss = record.get("averaged_validation_loss", record["validation_loss"])
        return self.progress.note_validation_loss(loss)
