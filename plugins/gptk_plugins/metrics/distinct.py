r"""The share of different n-grams among all n-grams, of all results of a prompt together.

$$\frac{|\text{different } n\text{-grams}|}{|n\text{-grams}|}$$

0 to 1; 1 is the most diverse. It falls with the length and the number of texts: compare it at equal
numbers of results. Li et al. 2016, "A Diversity-Promoting Objective Function for Neural
Conversation Models", divide by the number of words; this divides by the number of n-grams, like
most later work, so that texts without repetition have 1.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

import gptk
from gptk_plugins.metrics._ngrams import Text, ngrams


class Distinct(gptk.Metric):
    """distinct-n: different n-grams divided by all n-grams, over all results of a prompt."""

    name = "distinct"
    positional: ClassVar[str] = "n"

    n: int = Field(2, ge=1, description="the tokens of an n-gram")

    def measure(
        self, results: Sequence[gptk.Generation], logprobs: Sequence[Sequence[float]]
    ) -> float | None:
        return distinct([result.tokens for result in results], self.n)


def distinct(texts: Sequence[Text], n: int) -> float | None:
    """distinct-n of texts together; None if there are no n-grams.

    >>> distinct(["abab", "b"], 1)
    0.4
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None
