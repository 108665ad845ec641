"""Exponential moving average of the weights (Polyak & Juditsky 1992): ā ← d · ā + (1 - d) · w.

After step 1 the average is the weights. With d = decay at all further steps, the first weights keep
a large share of the average in a short run (0.999²⁰⁰⁰ = 14% after 2,000 steps), so by default
d = min(decay, (1 + n) / (10 + n)) after n updates.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

import gptk

UPDATES = "updates"


class EMA(gptk.Regularizer):
    """Averages the weights over the last steps; they are evaluated and saved beside the weights.

    Training itself is unchanged. The state holds an average by parameter name, updated in place,
    and the number of updates as `updates`.
    """

    name = "ema"
    example = "decay=0.999"
    positional = "decay"

    decay: float = Field(0.999, ge=0, lt=1, description="share of the average that a step keeps")
    warm_start: bool = Field(True, description="keep less of the average in the first steps")

    @torch.no_grad()
    def after_step(self, model: gptk.GPT, state: dict[str, Tensor]) -> None:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        if not state:
            state |= {name: weight.clone() for name, weight in weights.items()}
            state[UPDATES] = torch.tensor(1)
            return
        # On the CPU, whatever device it was restored to, so that reading it does not synchronize.
        state[UPDATES] = state[UPDATES].cpu() + 1
        n = int(state[UPDATES]) - 1
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_start else self.decay
        averages = [state[name] for name in weights]
        torch._foreach_lerp_(averages, list(weights.values()), 1 - decay)

    def averaged(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        return {name: average for name, average in state.items() if name != UPDATES} or None
