"""Inverse square root (Vaswani et al. 2017): η ∝ min(n^-½, n · w^-1.5), the peak scaled to 1.

With n = step + 1 and w = warmup + 1 that is n / w during warmup, then √(w / n) = √(w / (w + s)) at
s steps after the peak. It does not depend on the total number of steps.
"""

import math

from pydantic import Field

import gptk

WITHOUT_WARMUP = 10_000
"""T5's time scale (Raffel et al. 2020). With the formula's 1 the rate is a tenth after 99 steps."""


class InverseSqrt(gptk.LRScheduler):
    """Falls with the inverse square root of the step, independent of the run's length."""

    name = "inverse-sqrt"
    example = "warmup=4000"

    timescale: int | None = Field(
        None,
        ge=1,
        description="steps after the peak until the rate is 0.71 (1/√2) of it; by default "
        "warmup + 1, or 10000 without warmup",
    )

    def factor(self, step: int, total_steps: int) -> float:
        scale = self.timescale or (self.warmup + 1 if self.warmup else WITHOUT_WARMUP)
        return math.sqrt(scale / (scale + step))
