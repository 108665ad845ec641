"""Locally typical sampling (Meister et al. 2022): tokens about as surprising as is to be expected.

With the entropy H = -Σ p(v)·log p(v), tokens in the order of |-log p(v) - H| stay until they reach
mass p. So the likeliest token is the first to go where it is much likelier than the rest.
"""

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.processors._cut import keep_only
from gptk_plugins.processors._prefix import FEW, Floats, last_key

DEPTHS = (4, 7, 12)
"""How far from the entropy to look first, in nats. At 60 places of an English text SmolLM2's
typical tokens reach 0.9 within 4 at three of four, with 140 tokens to sort, and within 8 at all,
with 1,800."""


class Typical(gptk.LogitsProcessor):
    """Keeps the tokens whose surprise is nearest to the entropy, until they reach p."""

    name = "typical"
    example = "p=0.9"

    p: float = Field(0.9, gt=0, le=1, description="the probability to reach; 1 keeps all")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        if self.p == 1:
            return logits
        logprobs = logits.log_softmax(dim=-1)
        probabilities = logprobs.exp()
        entropy = _entropy(logprobs, probabilities)
        if len(logits) == 1 and logits.device.type == "cpu":
            # Most tokens are not even looked at: two thirds of the time.
            numbers = logprobs[0].numpy(), probabilities[0].numpy(), entropy.numpy()[0]
            kept = _typical(*numbers, self.p)
            if kept is not None:
                return keep_only(logits, kept)
        nearness = logprobs.add_(entropy).abs_().neg_()
        least = last_key(nearness, probabilities, self.p, DEPTHS)
        return torch.where(nearness < least, -torch.inf, logits)


def _entropy(logprobs: Tensor, probabilities: Tensor) -> Tensor:
    """(rows, 1). 0·log 0, of tokens that were taken out, counts as 0."""
    if len(logprobs) == 1:  # a third of the time, where there are none
        entropy = -torch.dot(probabilities[0], logprobs[0])
        if not entropy.isnan():
            return entropy.view(1, 1)
    return -(probabilities * logprobs).nansum(dim=-1, keepdim=True)


def _typical(
    logprobs: Floats, probabilities: Floats, entropy: Floats, p: float
) -> npt.NDArray[np.intp] | None:
    """The typical tokens of one row; None where they are not found among a few.

    entropy: (1,), so that sums are made in float32.
    """
    for depth in DEPTHS:
        near = np.flatnonzero(logprobs >= -entropy - np.float32(depth))
        if len(near) > FEW:
            return None
        distance = np.abs(logprobs[near] + entropy)
        order = np.argsort(distance)
        mass = np.cumsum(probabilities[near[order]], dtype=np.float64)
        last = int(np.searchsorted(mass, p))
        # Beyond the depth there may be others as near.
        if last < len(order) and distance[order[last]] <= depth:
            kept: npt.NDArray[np.intp] = near[distance <= distance[order[last]]]
            return kept
    return None
