"""Constant: η(step) = 1, after an optional warmup."""

import gptk


class Constant(gptk.LRScheduler):
    """The peak learning rate at every step after the warmup."""

    name = "constant"
    example = "warmup=100"

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0
