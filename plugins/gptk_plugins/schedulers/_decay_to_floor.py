"""The base class of schedules that decay from the peak to a floor."""

from pydantic import Field

import gptk


class DecayToFloor(gptk.LRScheduler):
    """floor + (1 - floor) · curve(t), where t runs from 0 at the peak to 1 at the last step.

    A subclass defines `curve`. A run of one step has the peak's rate.
    """

    floor: float = Field(0.0, ge=0, le=1, description="share of the peak rate at the last step")

    def curve(self, t: float) -> float:
        """The decay, from 1 at t = 0 down to 0 at t = 1."""
        raise NotImplementedError(f"{type(self).__name__} does not define curve()")

    def factor(self, step: int, total_steps: int) -> float:
        return self.floor + (1 - self.floor) * self.curve(step / max(total_steps - 1, 1))
