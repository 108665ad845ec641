"""Polynomial decay: η(t) = floor + (1 - floor) · (1 - t)^power, t from 0 to 1."""

from pydantic import Field

from gptk_plugins.schedulers._decay_to_floor import DecayToFloor


class Polynomial(DecayToFloor):
    """From the peak to the floor, steep at first with a power above 1."""

    name = "polynomial"
    example = "power=2"
    positional = "power"

    power: float = Field(2.0, gt=0, description="1 is a straight line; below 1 it ends steeply")

    def curve(self, t: float) -> float:
        return float((1 - t) ** self.power)
