r"""Mirostat (Basu et al. 2021): feedback keeps the text's mean surprise at a target τ, in bits.

A token's surprise is $S(v) = -\log_2 p(v)$. Each row has an estimate $\mu$, at first $2\tau$. At
each step some tokens stay, one of them is drawn, and the estimate is corrected:

$$\mu \leftarrow \mu - \eta\,(S(\text{token}) - \tau)$$

Version 2 (Algorithm 2): tokens with $S(v) \le \mu$ stay, and always the most likely one. Version 1
(Algorithm 1): the $k$ most likely stay,

$$k = \left(\frac{\varepsilon\, 2^{\mu}}{1 - N^{-\varepsilon}}\right)^{1/s}$$

$$\varepsilon = s - 1,
\qquad s = \frac{\sum_{i<m} t_i b_i}{\sum_{i<m} t_i^2}$$

$$t_i = \ln\frac{i+1}{i},
\qquad b_i = \ln\frac{p(i)}{p(i+1)}$$

where $N$ is the size of the vocabulary, and $s$ the exponent of Zipf's law fitted to the $m$ most
likely tokens.

$S$ is the surprise before the truncation, as in the paper and in its authors' program, because the
text's perplexity is measured by the full distribution. llama.cpp takes the probability after the
truncation, so that its texts have a higher perplexity at an equal $\tau$. $k$ is rounded to the
nearest whole number, at least 1 (llama.cpp rounds down, the authors' program adds 1 more).

"Before the truncation" means after the temperature and all other processors.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.samplers.multinomial import Multinomial


class Mirostat(Multinomial):
    """A token drawn after a truncation that keeps the text's mean surprise at a target."""

    name = "mirostat"
    example = "tau=4,eta=0.1"
    positional = "version"
    other_names = {
        "mirostat": "version",
        "mirostat_tau": "tau",
        "mirostat_ent": "tau",
        "mirostat_eta": "eta",
        "mirostat_lr": "eta",
    }

    version: int = Field(2, ge=1, le=2, description="2 is simpler, 1 is the paper's first")
    tau: float = Field(5.0, gt=0, description="the mean surprise to keep to, in bits")
    eta: float = Field(0.1, gt=0, description="how fast the truncation follows the error")
    m: int = Field(100, ge=2, description="of version 1: tokens that Zipf's law is fitted to")

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        truncation = MirostatTruncation(version=self.version, tau=self.tau, eta=self.eta, m=self.m)
        return (*super().processors(), truncation)


class MirostatTruncation(gptk.LogitsProcessor):
    """Keeps the tokens that mirostat draws from; its state is the estimate μ of each row."""

    name = "mirostat-truncation"

    version: int
    tau: float
    eta: float
    m: int

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        return self.start(rows)(logits, rows)

    def start(self, rows: gptk.Rows) -> "Estimate":
        return Estimate(self, len(rows))


class Estimate(gptk.Follower):
    """μ of each row, after each of its new tokens.

    A token updates μ only if the distribution that it was drawn from is known: the processor must
    have been called for the row right before that token. Other tokens (the second and later ones
    of several appended at once, or one that the distribution excludes) leave μ unchanged.
    Rewinding restores the earlier μ, and the last known distribution applies again if it was
    computed at that position.
    """

    def __init__(self, options: MirostatTruncation, rows: int) -> None:
        self._options = options
        self.mu = [[2 * options.tau] for _ in range(rows)]
        """For each row the initial estimate and that after each new token."""
        self._logprobs: Tensor | None = None
        self._positions: list[int | None] = [None] * rows
        """For each row the length of its `mu` when `_logprobs` was computed; None if `_logprobs`
        do not apply to the row."""

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        logprobs = logits.log_softmax(dim=-1)
        self._logprobs = logprobs
        self._positions = [len(mu) for mu in self.mu]
        limits = [mu[-1] * math.log(2) for mu in self.mu]  # in nats
        least = (
            self._zipf_cut(logprobs, limits)
            if self._options.version == 1
            else torch.minimum(
                -logprobs.new_tensor(limits)[:, None], logprobs.amax(-1, keepdim=True)
            )
        )
        return gptk.vocabulary.keep_from(logits, least, logprobs)

    def extend(self, tokens: Tensor) -> None:
        surprises = [math.inf] * len(self.mu)
        if self._logprobs is not None:
            first = self._logprobs.gather(1, tokens[:, :1])[:, 0]
            surprises = (first / -math.log(2)).tolist()
        for mu, position, surprise in zip(self.mu, self._positions, surprises, strict=True):
            new = mu[-1]
            if position == len(mu) and math.isfinite(surprise):
                new -= self._options.eta * (surprise - self._options.tau)
            mu += [new] * tokens.shape[1]

    def select(self, parents: Sequence[int]) -> None:
        self.mu = [list(self.mu[parent]) for parent in parents]
        self._positions = [self._positions[parent] for parent in parents]
        if self._logprobs is not None:
            self._logprobs = self._logprobs[list(parents)]

    def rewind(self, counts: Sequence[int]) -> None:
        for row, count in enumerate(counts):
            mu = self.mu[row]
            del mu[len(mu) - count :]
            position = self._positions[row]
            # A distribution computed after tokens that were dropped does not apply to others.
            if position is not None and position > len(mu):
                self._positions[row] = None

    def _zipf_cut(self, logprobs: Tensor, limits: Sequence[float]) -> Tensor:
        """The log-probability of each row's k-th token, (rows, 1). limits: μ in nats."""
        vocabulary = logprobs.shape[-1]
        top = gptk.vocabulary.top(logprobs, min(self._options.m, vocabulary)).values
        counts = [
            _zipf_count(row, mu, vocabulary) for row, mu in zip(top.tolist(), limits, strict=True)
        ]
        cut = logprobs.new_full((len(counts), 1), -torch.inf)
        truncated = [row for row, k in enumerate(counts) if k < vocabulary]
        if truncated:
            longest = max(counts[row] for row in truncated)
            if longest > top.shape[-1]:
                top = logprobs.topk(longest, dim=-1).values
            for row in truncated:
                cut[row] = top[row, counts[row] - 1]
        return cut


def _zipf_count(logprobs: Sequence[float], mu: float, vocabulary: int) -> int:
    """k, how many tokens stay. logprobs: of the m likeliest, descending; mu: in nats."""
    steps = [
        (math.log((i + 1) / i), current - next_)
        for i, (current, next_) in enumerate(itertools.pairwise(logprobs), start=1)
        if next_ > -math.inf
    ]
    if not steps:
        return 1
    s = sum(t * b for t, b in steps) / sum(t * t for t, _ in steps)
    if s == 0:  # all are equally likely, and ties with the k-th token stay
        return 1
    # In logarithms, because 2^μ would overflow; the fraction's limit for ε → 0 is 1 / ln N.
    epsilon, log_n = s - 1, math.log(vocabulary)
    fraction = epsilon / -math.expm1(-epsilon * log_n) if epsilon else 1 / log_n
    log_k = (math.log(fraction) + mu) / s
    return max(1, round(math.exp(log_k))) if log_k < math.log(vocabulary) else vocabulary
