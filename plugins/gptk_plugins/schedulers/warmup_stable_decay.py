"""Warmup, stable, decay (WSD; MiniCPM, Hu et al. 2024): constant, then a short fall at the end.

Over the last `decay` share of all steps, warmup included, η = floor + (1 - floor) · curve(t), where
t is 1 at the last step. curve(t) = 1 - √t and a share of a fifth are what Hägele et al. 2024 found
to match cosine. Before the decay nothing depends on the length of the run, so a checkpoint from
there can be continued to runs of any length.
"""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from gptk_plugins.schedulers._decay_to_floor import DecayToFloor
from gptk_plugins.schedulers._default_warmup import DefaultWarmup

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "sqrt": lambda t: 1 - math.sqrt(t),
}


class WarmupStableDecay(DefaultWarmup, DecayToFloor):
    """A linear rise, the peak for most of the run, and a fall to the floor at its end.

    The warmup takes 100 steps by default, and at most half of the run.
    """

    name = "warmup-stable-decay"
    example = "decay=0.2,shape=sqrt"

    decay: float = Field(0.2, gt=0, le=1, description="share of all steps in which the rate falls")
    shape: Literal["linear", "cosine", "sqrt"] = Field(
        "sqrt", description="of the decay; sqrt is 1 - √t, steep at first"
    )

    def curve(self, t: float) -> float:
        return _SHAPES[self.shape](t)

    def factor(self, step: int, total_steps: int) -> float:
        last = total_steps - 1
        decay_steps = min(max(round(self.decay * (self.warmup + total_steps)), 1), last)
        return super().factor(max(step - (last - decay_steps), 0), decay_steps + 1)
