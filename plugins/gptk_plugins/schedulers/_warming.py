"""What schedules with a warmup in their name share: they have one by default."""

from pydantic import Field

import gptk


class Warming(gptk.LRScheduler):
    """A schedule that warms up for 100 steps, or half of a run shorter than 200.

    The limit holds for a `warmup` that was asked for too, so that a run cut short for a trial
    has its peak and its end. Other schedules take `warmup` as it is given.
    """

    warmup: int = Field(
        100, ge=0, description="steps of linear warmup, at most half of the run's steps"
    )

    def __call__(self, step: int, total_steps: int) -> float:
        if self.warmup <= total_steps // 2:
            return super().__call__(step, total_steps)
        return self.model_copy(update={"warmup": total_steps // 2})(step, total_steps)
