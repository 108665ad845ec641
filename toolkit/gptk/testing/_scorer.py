"""The contract of scorers."""

import itertools
import math
from typing import Any, ClassVar

from hypothesis import strategies as st

import gptk
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, instance, promise, undisturbed, worst_and_drawn

LOGPROBS = [[], [0.0], [-30.0], [-1.0, -2.0, -0.5], [0.0] * 40, [-30.0] * 40]
REASONS = ["eos", "length", "stop", "time", "interrupted"]


class ScorerContract(PluginContract):
    """What a scorer promises."""

    _base: ClassVar[type] = gptk.Scorer

    @promise
    @worst_and_drawn(20)
    def test_a_score_is_a_number(self, data: st.DataObject | None) -> None:
        """It is finite for every result, an empty one too, and the same each time."""
        examples = [*itertools.product(LOGPROBS, REASONS)]
        if data is not None:
            logprobs = data.draw(st.lists(st.floats(-30, 0), max_size=8), label="logprobs")
            examples = [(logprobs, data.draw(st.sampled_from(REASONS), label="reason"))]
        for result in itertools.starmap(_result, examples):
            with undisturbed():
                score = self.plugin().score(result)
            check(
                isinstance(score, int | float) and math.isfinite(score),
                f"for {len(result.tokens)} tokens that end by {result.finish_reason} it returns "
                f"{score!r}",
            )
            again = self.plugin().score(result)
            check(again == score, "it returns another score the second time")

    @promise
    def test_one_instance_serves_several_calls(self) -> None:
        """A result's score does not depend on what was scored before."""
        results = [_result(*each) for each in itertools.product(LOGPROBS, REASONS)]
        want = [instance(self).score(result) for result in results]
        forwards = [self.plugin().score(result) for result in results]
        backwards = [self.plugin().score(result) for result in results[::-1]][::-1]
        check(forwards == backwards == want, "in another order the results get other scores")


def _result(logprobs: list[float], reason: Any) -> gptk.Generation:
    return gptk.Generation(
        text="x" * len(logprobs),
        tokens=[120] * len(logprobs),
        token_logprobs=logprobs,
        score=math.fsum(logprobs),
        finish_reason=reason,
        prompt_tokens=[1],
        seed=0,
    )
