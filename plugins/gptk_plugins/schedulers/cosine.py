"""Cosine annealing (SGDR, Loshchilov & Hutter 2017), without restarts.

η(t) = floor + (1 - floor) · (1 + cos πt) / 2, t from 0 at the peak to 1 at the last step.
"""

import math

from gptk_plugins.schedulers._decay_to_floor import DecayToFloor


class Cosine(DecayToFloor):
    """Half a cosine wave from the peak to the floor."""

    name = "cosine"
    example = "warmup=100,floor=0.1"

    def curve(self, t: float) -> float:
        return (1 + math.cos(math.pi * t)) / 2
