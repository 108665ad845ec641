"""The contract of scorers."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import gptk
from gptk.testing._promises import PluginContract, check, examples, promise, undisturbed


class ScorerContract(PluginContract):
    """What a scorer promises."""

    @promise
    @examples(20)
    @given(
        logprobs=st.lists(st.floats(-30, 0), max_size=8),
        reason=st.sampled_from(["eos", "length", "stop"]),
    )
    def test_a_score_is_a_number(self, logprobs: list[float], reason: Any) -> None:
        """It is finite for every result, an empty one too, and the same each time."""
        result = gptk.Generation(
            text="x" * len(logprobs),
            tokens=[120] * len(logprobs),
            token_logprobs=logprobs,
            score=math.fsum(logprobs),
            finish_reason=reason,
            prompt_tokens=[1],
            seed=0,
        )
        with undisturbed():
            score = self.plugin().score(result)
        check(isinstance(score, int | float) and math.isfinite(score), f"it returns {score!r}")
        check(self.plugin().score(result) == score, "it returns another score the second time")
