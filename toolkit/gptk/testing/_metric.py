"""The contract of metrics."""

import math
from typing import Any, ClassVar

from hypothesis import strategies as st

import gptk
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, instance, promise, undisturbed, worst_and_drawn

Group = list[tuple[list[int], list[float]]]
"""Of each result of a prompt its tokens, and their log-probabilities under the model."""
GROUPS: list[Group] = [
    [],
    [([], [])],
    [([120], [0.0])],
    [([120, 121, 120, 121], [-1.0, -2.0, -0.5, -30.0]), ([], [])],
    [([1] * 40, [-30.0] * 40)] * 3,
    [(list(range(20)), [-1.0] * 20), (list(range(20, 0, -1)), [-1.0] * 20)],
]


class MetricContract(PluginContract):
    """What a metric promises."""

    _base: ClassVar[type] = gptk.Metric

    @promise
    @worst_and_drawn(20)
    def test_a_measure_is_a_number_or_none(self, data: st.DataObject | None) -> None:
        """It is finite, and weighs 0 or more, for results of any number and length, also for none;
        and it is the same each time."""
        groups = GROUPS
        if data is not None:
            result = st.lists(st.tuples(st.integers(0, 9), st.floats(-30, 0)), max_size=8)
            drawn = data.draw(st.lists(result, max_size=4), label="tokens with log-probabilities")
            groups = [[([t for t, _ in one], [p for _, p in one]) for one in drawn]]
        for group in groups:
            with undisturbed():
                value, weight = _measured(self.plugin(), group)
            what = f"for {len(group)} results of {[len(tokens) for tokens, _ in group]} tokens"
            check(
                value is None or (isinstance(value, int | float) and math.isfinite(value)),
                f"{what} measure() returns {value!r}",
            )
            check(
                isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0,
                f"{what} weight() returns {weight!r}",
            )
            again = _measured(self.plugin(), group)
            check(again == (value, weight), f"{what} it returns something else the second time")

    @promise
    def test_results_are_left_as_they_were(self) -> None:
        """Other metrics measure the same results afterwards."""
        for group in GROUPS:
            results, logprobs = _results(group)
            self.plugin().measure(results, logprobs)
            self.plugin().weight(results)
            check((results, logprobs) == _results(group), "it changes what it measures")

    @promise
    def test_one_instance_serves_several_calls(self) -> None:
        """What it measures does not depend on what was measured before."""
        want = [_measured(instance(self), group) for group in GROUPS]
        forwards = [_measured(self.plugin(), group) for group in GROUPS]
        backwards = [_measured(self.plugin(), group) for group in GROUPS[::-1]][::-1]
        check(forwards == backwards == want, "in another order it measures something else")


def _measured(metric: Any, group: Group) -> tuple[object, Any]:
    results, logprobs = _results(group)
    return metric.measure(results, logprobs), metric.weight(results)


def _results(group: Group) -> tuple[list[gptk.Generation], list[list[float]]]:
    results = [
        gptk.Generation(
            text="".join(chr(97 + token) for token in tokens),
            tokens=list(tokens),
            token_logprobs=list(logprobs),
            score=math.fsum(logprobs),
            finish_reason="length",
            prompt_tokens=[1],
            seed=0,
        )
        for tokens, logprobs in group
    ]
    return results, [list(logprobs) for _, logprobs in group]
