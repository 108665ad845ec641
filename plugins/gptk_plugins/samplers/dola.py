r"""DoLa (Chuang et al. 2024): contrasts the last layer's predictions with an earlier layer's.

$$F(v) = \begin{cases}
\log q_N(v) - \log q_M(v) & \text{if } q_N(v) \ge \alpha \max_w q_N(w) \\
\log q_N(v) - 1000 & \text{otherwise}
\end{cases}$$

$q_N$ are the model's probabilities, $q_M$ those that its head computes from an earlier layer's
hidden state, without the final norm. $M$ is the candidate layer farthest from the last one by
Jensen-Shannon divergence, chosen anew for each row and step. Processors and the sampler work on
$\operatorname{softmax}(F)$. In the paper $F$ is $-\infty$ otherwise; here it is a penalty instead,
so that a constraint can still choose these tokens.

Layers are counted as in the paper's code and transformers: 0 are the embeddings. As there, "low"
are every second layer of the lower half, from 2 on where the head is tied to the embeddings, and
"high" every second one of the upper half. The divergence is computed for each row, as in the paper;
transformers takes its mean over the batch.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

import gptk
from gptk_plugins.samplers._wrapping import WrappingSampler

IMPLAUSIBLE_PENALTY = 1000.0
"""Subtracted from the log-probability of tokens with q_N(v) < α · max q_N. exp(-1000) is 0 in
floating point, so they are never chosen unless processors mask all others."""


class DoLa(WrappingSampler):
    """Contrasts the last layer with an earlier one, which favours factual knowledge."""

    name = "dola"
    example = "layers=high"
    positional = "layers"
    other_names = {"dola_layers": "layers"}

    sampler: str = Field("greedy", description="the sampler that chooses the tokens, a spec")
    layers: Literal["low", "high"] | tuple[int, ...] = Field(
        "high", description="the earlier layers: a half of them, or a list such as [8, 10]"
    )
    alpha: float = Field(
        0.1,
        gt=0,
        le=1,
        description="tokens below this share of the top probability are ruled out",
    )

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.wrapped.random

    @model_validator(mode="after")
    def _wraps_a_sampler_that_only_chooses(self) -> "DoLa":
        wrapped = self.wrapped
        if (
            wrapped.competing
            or type(wrapped).advance is not gptk.Sampler.advance
            or isinstance(wrapped, WrappingSampler)
        ):
            raise ValueError(f"{wrapped.name} decides by more than logits; greedy and top-p do not")
        return self

    def max_rows(self, n: int) -> int:
        return self.wrapped.max_rows(n)

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
    """F of the formula above: (rows, vocab).

    final, earlier: log-probabilities, (rows, vocab) and (rows, layers, vocab).
    """
    q_n, q_m = final.exp()[:, None], earlier.exp()
    mean = ((q_m + q_n) / 2).log()
    divergence = (q_n * (final[:, None] - mean)).nansum(-1) + (q_m * (earlier - mean)).nansum(-1)
    farthest = divergence.argmax(dim=-1)
    difference = final - earlier[torch.arange(len(final), device=final.device), farthest]
    least = final.amax(dim=-1, keepdim=True) + math.log(alpha)
    return torch.where(final >= least, difference, final - IMPLAUSIBLE_PENALTY)
