r"""Mean log-probability of a result's tokens, after all processors, without EOS.

$$\frac{1}{|y|} \sum_t \log p(y_t \mid y_{<t})$$
"""

import math

import gptk

LEAST = -1e9
"""The score of a result without tokens: as an empty sum, 0, it would be the best of all."""


class MeanLogprob(gptk.Scorer):
    """The mean log-probability of a result's tokens."""

    name = "mean-logprob"

    def score(self, result: gptk.Generation) -> float:
        if not result.token_logprobs:
            return LEAST
        return math.fsum(result.token_logprobs) / len(result.token_logprobs)
