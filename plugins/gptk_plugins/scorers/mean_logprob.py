"""Mean log-probability: Σ log p(tokenₜ) / length, after all processors, EOS left out."""

import math

import gptk

LEAST = -1e9
"""Of a result without tokens, which would else be the best of all at 0."""


class MeanLogprob(gptk.Scorer):
    """How likely the model finds a result, a token."""

    name = "mean-logprob"

    def score(self, result: gptk.Generation) -> float:
        if not result.token_logprobs:
            return LEAST
        return math.fsum(result.token_logprobs) / len(result.token_logprobs)
