"""The contract of LR schedulers."""

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gptk.testing._promises import PluginContract, check, examples, options_schema, promise

TOTALS = st.integers(1, 300)
WARMUPS = st.integers(0, 40)


class SchedulerContract(PluginContract):
    """What an LR scheduler promises."""

    def scheduler(self, warmup: int = 0) -> Any:
        """The scheduler to test, with `warmup` steps of warmup."""
        plugin = self.plugin()
        bounds = options_schema(plugin).get("warmup", {})
        warmup = max(warmup, bounds.get("minimum", 0))
        return type(plugin)(**{**plugin.model_dump(exclude_defaults=True), "warmup": warmup})

    @promise
    @examples(25)
    @given(total=TOTALS, warmup=WARMUPS)
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
    @examples(25)
    @given(total=TOTALS, warmup=WARMUPS, data=st.data())
    def test_a_resumed_schedule_equals_an_unbroken_one(
        self, total: int, warmup: int, data: st.DataObject
    ) -> None:
        """The factor is a function of the step; earlier calls make no difference.

        A resumed run makes a new scheduler and begins with it in the middle.
        """
        unbroken = self.scheduler(warmup)
        whole = [unbroken(step, total) for step in range(total)]
        start = data.draw(st.integers(0, total - 1), label="resumed at")
        resumed = self.scheduler(warmup)
        rest = [resumed(step, total) for step in range(start, total)]
        check(
            rest == whole[start:],
            f"resumed at step {start} of {total} it returns {rest[:3]}, unbroken "
            f"{whole[start : start + 3]}",
        )
        check(unbroken(0, total) == whole[0], "called again for step 0 it returns another factor")

    @promise
    @examples(25)
    @given(total=TOTALS, warmup=WARMUPS)
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
    def test_after_the_last_step_nothing_changes(self, total: int) -> None:
        """Steps past the end have the factor of the last step."""
        scheduler = self.scheduler()
        last = scheduler(total - 1, total)
        check(scheduler(total + 7, total) == last, "it changes after the last step")
