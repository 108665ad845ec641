"""Mean log-probability: Σ log p(tokenₜ) / length, after all processors, EOS left out."""

import math

import gptk


class MeanLogprob(gptk.Scorer):
    """How likely the model finds a result, a token."""

    name = "mean-logprob"

    def score(self, result: gptk.Generation) -> float:
        return math.fsum(result.token_logprobs) / max(len(result.token_logprobs), 1)
