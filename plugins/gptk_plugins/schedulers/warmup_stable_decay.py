"""Warmup, stable, decay (WSD; MiniCPM, Hu et al. 2024): constant, then a short fall at the end.

Over the last `decay` share of all steps, warmup included, η = floor + (1 - floor) · fall(t) with
t up to 1 at the last step. fall(t) = 1 - √t is the shape and a fifth the share that Hägele et
al. 2024 found to reach what cosine does. Before the fall nothing depends on the length of the
run, so a checkpoint from there serves runs of any length.
"""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from gptk_plugins.schedulers._falling import Falling
from gptk_plugins.schedulers._warming import Warming

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "sqrt": lambda t: 1 - math.sqrt(t),
}


class WarmupStableDecay(Warming, Falling):
    """A linear rise, the peak for most of the run, and a fall to the floor at its end.

    The rise takes 100 steps unless told otherwise, and never more than half of the run.
    """

    name = "warmup-stable-decay"
    example = "decay=0.2,shape=sqrt"

    decay: float = Field(0.2, gt=0, le=1, description="share of all steps in which the rate falls")
    shape: Literal["linear", "cosine", "sqrt"] = Field(
        "sqrt", description="of the fall; sqrt is 1 - √t, steep at first"
    )

    def fall(self, t: float) -> float:
        return _SHAPES[self.shape](t)

    def factor(self, step: int, total_steps: int) -> float:
        last = total_steps - 1
        falling = min(max(round(self.decay * (self.warmup + total_steps)), 1), last)
        return super().factor(max(step - (last - falling), 0), falling + 1)
