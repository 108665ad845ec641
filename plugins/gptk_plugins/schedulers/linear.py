"""Linear decay: η(t) = floor + (1 - floor) · (1 - t), t from 0 to 1."""

from gptk_plugins.schedulers._decay_to_floor import DecayToFloor


class Linear(DecayToFloor):
    """From the peak in a straight line to the floor."""

    name = "linear"
    example = "warmup=100,floor=0.1"

    def curve(self, t: float) -> float:
        return 1 - t
