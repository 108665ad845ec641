"""Linear decay: η(t) = floor + (1 - floor) · (1 - t), t from 0 to 1."""

from gptk_plugins.schedulers._falling import Falling


class Linear(Falling):
    """From the peak in a straight line to the floor."""

    name = "linear"
    example = "warmup=100,floor=0.1"

    def fall(self, t: float) -> float:
        return 1 - t
