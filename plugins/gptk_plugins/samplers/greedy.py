"""Greedy decoding: argmaxᵥ p(v | tokens so far)."""

from torch import Tensor

import gptk


class Greedy(gptk.Sampler):
    """The most likely token at each step."""

    name = "greedy"

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        return gptk.Choice.one_each(logits.argmax(dim=-1), logits, rows)
