"""One cycle (Smith & Topin 2018), in the cosine form of torch's OneCycleLR.

From 1 / start_divisor up to the peak by half a cosine wave, then by another down to
1 / (start_divisor · final_divisor) at the last step. As in torch the peak is at step
rise · steps - 1, which can be between two steps. Only the learning rate cycles, not Adam's betas.
"""

import math

from pydantic import Field

import gptk


class OneCycle(gptk.LRScheduler):
    """Up from a low rate to the peak, then down to a far lower one.

    The rise is part of the cycle; `warmup` steps, if any, come before it.
    """

    name = "one-cycle"
    example = "rise=0.3"
    positional = "rise"

    rise: float = Field(0.3, ge=0, lt=1, description="share of the steps up to the peak")
    start_divisor: float = Field(25.0, ge=1, description="peak rate / first rate")
    final_divisor: float = Field(1e4, ge=1, description="first rate / last rate")

    def factor(self, step: int, total_steps: int) -> float:
        last = total_steps - 1
        if last == 0:
            return 1.0
        first_rate = 1 / self.start_divisor
        peak = max(self.rise * total_steps - 1, 0.0)
        if step < peak:
            return _cosine_bump(step / peak - 1, down_to=first_rate)
        return _cosine_bump((step - peak) / (last - peak), down_to=first_rate / self.final_divisor)


def _cosine_bump(t: float, *, down_to: float) -> float:
    """1 at t = 0, falling by half a cosine wave to `down_to` at t = -1 and t = 1."""
    return down_to + (1 - down_to) * (1 + math.cos(math.pi * t)) / 2
