r"""The share of n-grams that repeat an earlier one of the same text: the mean over results.

$$1 - \frac{|\text{different } n\text{-grams}|}{|n\text{-grams}|}$$

0 to 1; 1 is the most repetitive. Welleck et al. 2020, "Neural Text Generation with Unlikelihood
Training".
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

import gptk
from gptk_plugins.metrics._ngrams import Text
from gptk_plugins.metrics.distinct import distinct


class SeqRep(gptk.Metric):
    """seq-rep-n: the share of n-grams that repeat an earlier one of the same text."""

    name = "seq-rep"
    positional: ClassVar[str] = "n"

    n: int = Field(4, ge=1, description="the tokens of an n-gram")

    def measure(
        self, results: Sequence[gptk.Generation], logprobs: Sequence[Sequence[float]]
    ) -> float | None:
        shares = self._shares(results)
        return math.fsum(shares) / len(shares) if shares else None

    def weight(self, results: Sequence[gptk.Generation]) -> float:
        return len(self._shares(results))

    def _shares(self, results: Sequence[gptk.Generation]) -> list[float]:
        """Of the results that are long enough."""
        shares = [seq_rep(result.tokens, self.n) for result in results]
        return [share for share in shares if share is not None]


def seq_rep(text: Text, n: int) -> float | None:
    """seq-rep-n of a text; None if there are no n-grams.

    >>> seq_rep("abcabcabc", 3)
    0.5714285714285714
    """
    share = distinct([text], n)
    return None if share is None else 1 - share
