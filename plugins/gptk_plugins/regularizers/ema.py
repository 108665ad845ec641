"""Exponential moving average of the weights (Polyak & Juditsky 1992): ā ← d · ā + (1 - d) · w.

After step 1 the average is the weights; d = decay from step 2 on. A plain average of a short run
remembers its beginning for too long (0.999²⁰⁰⁰ = 14% of it is the weights after step 1), so it
starts warm: d = min(decay, (1 + n) / (10 + n)) after n updates.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

import gptk

UPDATES = "updates"


class EMA(gptk.Regularizer):
    """Averages the weights over the last steps, to be evaluated and saved beside the trained ones.

    Training itself goes on as without it. The state is an average by parameter name, changed in
    place, and the count of updates as `updates`.
    """

    name = "ema"
    example = "decay=0.999"

    decay: float = Field(0.999, ge=0, lt=1, description="share of the average that a step keeps")
    warm_start: bool = Field(True, description="keep less of the first averages, which are poor")

    @torch.no_grad()
    def after_step(self, model: gptk.GPT, state: dict[str, Tensor]) -> None:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        if not state:
            state |= {name: weight.clone() for name, weight in weights.items()}
            state[UPDATES] = torch.tensor(1)
            return
        # On the CPU, wherever it was restored: reading it waits for no device.
        state[UPDATES] = state[UPDATES].cpu() + 1
        n = int(state[UPDATES]) - 1
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_start else self.decay
        averages = [state[name] for name in weights]
        torch._foreach_lerp_(averages, list(weights.values()), 1 - decay)

    def averaged(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        return {name: average for name, average in state.items() if name != UPDATES} or None
