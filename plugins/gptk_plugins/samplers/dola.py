"""DoLa (Chuang et al. 2024): what the last layer knows and an earlier one does not know yet.

    F(v) = log q_N(v) - log q_M(v)   where q_N(v) ≥ α · max q_N,   and out of the question elsewhere

q_N are the model's probabilities, q_M those that its head makes of an earlier layer's state, as
it is. M is the candidate layer farthest from the last one, by Jensen-Shannon divergence, for each
row and step anew. softmax(F) is what processors and the sampler get.

Layers are counted as in the paper's code and transformers: 0 are the embeddings. As there, "low"
are the even layers of the lower half, those up to 2 left out where embeddings and head are one,
and "high" the even ones of the upper half. The divergence is the paper's for each row; in
transformers it is a mean over the batch.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

import gptk
from gptk_plugins.samplers._over import Over

OUT = 1000.0
"""Taken from the log-probability of tokens out of the question: nothing is left of them, unless
processors take out all others. exp(-1000) is 0, and a constraint still finds a token."""


class DoLa(Over):
    """Contrasts the last layer with an earlier one: for answers from knowledge."""

    name = "dola"
    example = "layers=high"

    sampler: str = Field("greedy", description="the sampler that chooses the tokens, a spec")
    layers: Literal["low", "high"] | tuple[int, ...] = Field(
        "high", description="the earlier layers: a half of them, or a list such as [8, 10]"
    )
    alpha: float = Field(
        0.1, gt=0, le=1, description="tokens stay from this share of the highest probability on"
    )

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.base.random

    @model_validator(mode="after")
    def _rests_on_one_that_only_chooses(self) -> "DoLa":
        base = self.base
        if (
            base.competing
            or type(base).advance is not gptk.Sampler.advance
            or isinstance(base, Over)
        ):
            raise ValueError(
                f"{self.base.name} decides by more than logits; greedy and top-p do not"
            )
        return self

    def max_rows(self, n: int) -> int:
        return self.base.max_rows(n)

    def hidden_layers(self, config: gptk.ModelConfig) -> Sequence[int]:
        last = config.n_layers
        if not last:
            raise gptk.IncompatibleError(
                f"sampler {self.name} contrasts layers, and this model has none to contrast"
            )
        if isinstance(self.layers, tuple):
            layers = sorted(set(self.layers))
        elif self.layers == "high":
            layers = list(range(last // 2 if last <= 40 else last - 20, last, 2))
        else:
            first = min(2, last - 1) if config.tied_head else 0
            layers = list(range(first, last // 2 if last <= 40 else 20, 2)) or [first]
        if not layers or layers[0] < 0 or layers[-1] >= last:
            raise gptk.OptionError(
                f"sampler {self.name}: the layers {layers} are not all earlier ones of this model; "
                f"these are 0 to {last - 1}"
            )
        return layers

    def logits(self, session: gptk.DecodeSession) -> Tensor:
        final = session.logits.log_softmax(dim=-1)
        earlier = session.model.logits(session.layer_hidden).log_softmax(dim=-1)
        return contrast(final, earlier, self.alpha)


def contrast(final: Tensor, earlier: Tensor, alpha: float) -> Tensor:
    """F of the formula above. Log-probabilities, (rows, vocab) and (rows, layers, vocab)."""
    q = final.exp()[:, None]
    p = earlier.exp()
    mean = ((p + q) / 2).log()
    divergence = (q * (final[:, None] - mean)).nansum(-1) + (p * (earlier - mean)).nansum(-1)
    farthest = divergence.argmax(dim=-1)
    difference = final - earlier[torch.arange(len(final), device=final.device), farthest]
    least = final.amax(dim=-1, keepdim=True) + math.log(alpha)
    return torch.where(final >= least, difference, final - OUT)
