"""The base class of schedules that warm up by default."""

from pydantic import Field

import gptk


class DefaultWarmup(gptk.LRScheduler):
    """A schedule with a linear warmup of 100 steps, or of half the run if it is shorter than 200.

    The limit of half the run holds for any `warmup`, so that a short trial run reaches its peak and
    its end. Other schedules have no such limit.
    """

    warmup: int = Field(
        100, ge=0, description="steps of linear warmup, at most half of the run's steps"
    )

    def __call__(self, step: int, total_steps: int) -> float:
        if self.warmup <= total_steps // 2:
            return super().__call__(step, total_steps)
        return self.model_copy(update={"warmup": total_steps // 2})(step, total_steps)
