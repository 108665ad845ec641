"""The contract of LR schedulers."""

import itertools
from typing import Any, ClassVar

from hypothesis import example, given
from hypothesis import strategies as st

import gptk
from gptk.testing._plugin import PluginContract, options_schema
from gptk.testing._promises import check, examples, instance, promise, undisturbed

TOTALS = st.integers(1, 300)
WARMUPS = st.integers(0, 40)


def bounds(test: Any) -> Any:
    """Add examples at the bounds: a single step, no warmup, nothing but warmup, and more."""
    for total, warmup in ((1, 0), (1, 1), (2, 1), (2, 5), (3, 2), (10, 5), (100, 0), (300, 40)):
        test = example(total=total, warmup=warmup)(test)
    return test


class SchedulerContract(PluginContract):
    """What an LR scheduler promises."""

    _base: ClassVar[type] = gptk.LRScheduler

    def scheduler(self, warmup: int = 0) -> Any:
        """A new scheduler to test, with `warmup` steps of warmup."""
        plugin = instance(self)
        least = options_schema(type(plugin)).get("warmup", {}).get("minimum", 0)
        options = {name: getattr(plugin, name) for name in plugin.model_fields_set}
        return type(plugin)(**{**options, "warmup": max(warmup, least)})

    @promise
    @examples(20)
    @given(total=TOTALS, warmup=WARMUPS)
    @bounds
    def test_it_is_a_share_of_the_peak(self, total: int, warmup: int) -> None:
        """At every step the factor is from 0 to 1: the setting `lr` is the highest rate."""
        scheduler = self.scheduler(warmup)
        for step in range(total + 3):
            factor = scheduler(step, total)
            check(
                isinstance(factor, int | float) and -1e-9 <= factor <= 1 + 1e-9,
                f"at step {step} of {total}, with {warmup} steps of warmup, it is {factor!r}",
            )

    @promise
    @examples(20)
    @given(total=TOTALS, warmup=WARMUPS)
    @bounds
    def test_a_resumed_schedule_equals_an_unbroken_one(self, total: int, warmup: int) -> None:
        """The factor is a function of the step; earlier calls make no difference.

        A resumed run makes a new scheduler and begins with it in the middle.
        """
        unbroken = self.scheduler(warmup)
        with undisturbed():
            whole = [unbroken(step, total) for step in range(total)]
        for start in sorted({0, total // 2, total - 1}):
            resumed = self.scheduler(warmup)
            rest = [resumed(step, total) for step in range(start, total)]
            check(
                rest == whole[start:],
                f"resumed at step {start} of {total} it returns {rest[:3]}, unbroken "
                f"{whole[start : start + 3]}",
            )
        for other in (total + 1, 3 * total):  # another run's
            unbroken(total // 2, other)
        back = [unbroken(step, total) for step in reversed(range(total))][::-1]
        check(back == whole, "called again, and for other runs, it returns other factors")

    @promise
    @examples(20)
    @given(total=TOTALS, warmup=WARMUPS)
    @bounds
    def test_warmup_never_falls(self, total: int, warmup: int) -> None:
        """During warmup the rate rises, up to where the schedule begins."""
        # Half the steps, as a schedule may allow no more.
        scheduler = self.scheduler(min(warmup, total // 2))
        warmup = scheduler.warmup
        rates = [scheduler(step, total) for step in range(min(warmup + 1, total))]
        check(
            all(a <= b + 1e-12 for a, b in itertools.pairwise(rates))
            and (warmup < 2 or warmup > total // 2 or rates[0] < rates[warmup - 1]),
            f"with {warmup} steps of warmup, of {total}, it begins with "
            f"{[round(rate, 4) for rate in rates[:9]]}",
        )

    @promise
    @examples(10)
    @given(total=TOTALS)
    @example(total=1)
    @example(total=2)
    def test_after_the_last_step_nothing_changes(self, total: int) -> None:
        """Steps past the end have the factor of the last step."""
        scheduler = self.scheduler()
        last = scheduler(total - 1, total)
        for past in (0, 1, 7, total):
            check(scheduler(total + past, total) == last, "it changes after the last step")
