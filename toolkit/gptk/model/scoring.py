"""The log-probabilities, loss and perplexity of a text under a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk.errors import counted
from gptk.model.protocol import CausalModel, evaluating


@dataclass(frozen=True, repr=False)
class Score:
    """How probable a text is under a model."""

    tokens: list[int]
    token_logprobs: list[float]
    """For each token but the first its log-probability, given the tokens before it, in nats."""

    @property
    def loss(self) -> float:
        """The mean negative log-probability, in nats a token (cross entropy)."""
        return -math.fsum(self.token_logprobs) / len(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally probable tokens that would give the same loss."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def __repr__(self) -> str:
        return (
            f"Score({counted(len(self.tokens), 'token')}, loss {self.loss:.4f}, "
            f"perplexity {self.perplexity:.4f})"
        )


@torch.inference_mode()
def score(model: CausalModel, ids: Sequence[int]) -> Score:
    """The log-probability of each token but the first. ids: two or more, within the window."""
    tokens = torch.tensor(ids, device=model.device)
    states = final_states(model, tokens[None, :-1])[0]
    logprobs = token_logprobs(model, states, tokens[1:])
    return Score(tokens=list(ids), token_logprobs=logprobs.tolist())


def final_states(model: CausalModel, ids: Tensor) -> Tensor:
    """The final hidden state after each token, without a cache and without dropout.

    ids: (rows, time). Returns (rows, time, width).
    """
    with evaluating(model):
        return model.states(ids, None, None, ())[:, :, 0]


def token_logprobs(model: CausalModel, states: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target. states: (n, width); targets: (n,). Returns (n,) float32.

    In chunks, so that the logits of a whole text are never in memory at once.
    """
    parts = []
    for start in range(0, len(states), CHUNK):
        with evaluating(model):
            logits = model.logits(states[start : start + CHUNK])
        chunk = targets[start : start + CHUNK]
        parts.append(-F.cross_entropy(logits, chunk, reduction="none"))
    return torch.cat(parts)


CHUNK = 256
"""Positions whose logits are computed at a time: 50 MB with GPT-2's vocabulary."""
