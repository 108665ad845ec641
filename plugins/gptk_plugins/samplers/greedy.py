r"""Greedy decoding: the likeliest token at each step.

$$\operatorname*{argmax}_v\ p(v \mid y_{<t})$$
"""

import torch
from torch import Tensor

import gptk


class Greedy(gptk.Sampler):
    """The most likely token at each step."""

    name = "greedy"

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        return gptk.Choice.one_each(_argmax(logits), logits, rows)


def _argmax(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":  # numpy takes an eighth of the time
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)
