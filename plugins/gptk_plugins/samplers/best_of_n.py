r"""Best of n (Stiennon et al. 2020): draw n results, keep those with the highest scores.

$$\operatorname*{argmax}_{i \le n}\ \text{scorer}(y^{(i)})$$

By default the scorer is the mean log-probability,

$$\frac{1}{|y|} \sum_t \log p(y_t \mid y_{<t})$$
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from numbers import Real

from pydantic import Field, model_validator

import gptk
from gptk_plugins.samplers._wrapping import WrappingSampler


class BestOfN(WrappingSampler):
    """The best of several samples, by mean log-probability or by a scorer of your own."""

    name = "best-of-n"
    example = 'n=8,sampler="top-p:p=0.9"'
    positional = "n"
    other_names = {"best_of": "n"}
    random = True

    n: int = Field(8, ge=1, description="how many results to draw")
    scorer: str = Field("mean-logprob", description="the scorer that ranks the results, a spec")

    @model_validator(mode="after")
    def _draws_results(self) -> "BestOfN":
        _ = self._scorer
        if not self.wrapped.random or self.wrapped.competing or type(self.wrapped) is BestOfN:
            raise ValueError(
                f"{self.wrapped.name} does not draw results one by one, so there is no best of "
                "several; a sampler that does is top-p"
            )
        return self

    @functools.cached_property
    def _scorer(self) -> gptk.Scorer:
        return gptk.plugins.create("scorer", self.scorer, gptk.Scorer)

    def max_rows(self, n: int) -> int:
        if n > self.n:
            raise gptk.OptionError(
                f"n={n} results are more than the {self.n} drawn; ask for at most {self.n}, or "
                f"give {self.name}:n={n}"
            )
        return self.n

    def pick(self, results: Sequence[gptk.Generation], n: int) -> Sequence[gptk.Generation]:
        scored = [dataclasses.replace(result, score=self._score(result)) for result in results]
        return sorted(scored, key=lambda result: result.score, reverse=True)[:n]

    def _score(self, result: gptk.Generation) -> float:
        """The scorer's score. Raises PluginError if that is no number, which has no order."""
        score = self._scorer.score(result)
        if not isinstance(score, Real) or math.isnan(score):
            raise gptk.PluginError(
                f"{self._scorer.title()}: score() returned {type(score).__name__} {score!s:.40}; "
                "it must return a number"
            )
        return float(score)
