r"""Mean log-probability of the new tokens under the model itself, without processors and EOS.

$$\frac{1}{N} \sum_t \log p(y_t \mid \text{all tokens before it})$$

over all N tokens of all results; nats a token. The log-probabilities that samplers report are those
of a different distribution for each sampler, and cannot be compared.
"""

import itertools
import math
from collections.abc import Sequence

import gptk


class MeanLogprob(gptk.Metric):
    """The mean log-probability of the new tokens under the model itself, in nats a token."""

    name = "mean-logprob"

    def measure(
        self, results: Sequence[gptk.Generation], logprobs: Sequence[Sequence[float]]
    ) -> float | None:
        each = [*itertools.chain(*logprobs)]
        return math.fsum(each) / len(each) if each else None

    def weight(self, results: Sequence[gptk.Generation]) -> float:
        return sum(len(result.tokens) for result in results)
