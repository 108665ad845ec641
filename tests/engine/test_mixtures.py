"""Mixtures of runs of two models that share a budget, which arrive, are cancelled or fail at any
pass: each of the others gives what it gives alone, and nothing is left behind."""

import os
import queue
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixtures import LM, MORE_STRATEGIES, OTHER, Raises, alike, check_equal, memory_for, requests_of

import gptk
from gptk.engine.engine import ENGINE
from gptk.engine.passes import Passes
from gptk.engine.run import CancelledError, Run
from gptk.model.pool import BlockPool

MANY = int(os.environ.get("GPTK_TEST_MIXTURES", "200"))
"""How many mixtures the slow test tries."""

FAILING = {"sampler": "top-p:0.9", "n": 2, "processors": [Raises(after=2)]}


@dataclass
class Planned:
    """A run of a mixture."""

    request: gptk.Request
    is_other: bool = False
    """Whether it uses the larger model."""
    arrival: int = 0
    """The pass before which it comes."""
    cancelled: int | None = None
    """The pass before which it is cancelled."""

    @property
    def lm(self) -> gptk.LanguageModel:
        return OTHER if self.is_other else LM


planned = st.builds(
    Planned,
    requests_of([*MORE_STRATEGIES, FAILING], alike),
    st.booleans(),
    st.integers(0, 6),
    st.one_of(st.none(), st.none(), st.integers(0, 20)),
)
mixtures = st.lists(planned, min_size=3, max_size=10)
budgets = st.one_of(st.none(), st.integers(1, 12), st.integers(8, 24), st.integers(1, 40))
seeds = st.integers(0, 2**16)


class Mixture:
    """Starts and cancels the runs of a mixture as planned, and collects them."""

    def __init__(self, plans: list[Planned], seed: int) -> None:
        self._plans, self._seed = plans, seed
        self.runs: list[Run[gptk.Generation]] = []
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._started: set[int] = set()
        for plan in plans:
            stream = plan.lm.stream(plan.request.prompt, **{"seed": seed, **plan.request.settings})
            self.runs.append(Run(stream.run, stream.rows, self._end))
        self._passes = 0

    def run(self) -> None:
        first = min(plan.arrival for plan in self._plans)
        ENGINE.call(lambda: self._start_at(first))
        for _ in self.runs:
            self._ended.get(timeout=30)

    def before_pass(self) -> None:
        """In the engine's thread."""
        self._passes += 1
        self._start_at(self._passes)
        for number in self._started:
            cancelled = self._plans[number].cancelled
            if cancelled is not None and cancelled <= self._passes:
                self.runs[number].cancel()

    def _start_at(self, passes: int) -> None:
        for number, plan in enumerate(self._plans):
            if number not in self._started and plan.arrival <= passes:
                self._started.add(number)
                ENGINE.start([self.runs[number]])

    def _end(self, run: Run[gptk.Generation]) -> None:
        if all(self.runs[number].has_ended for number in self._started):
            left = [p.arrival for n, p in enumerate(self._plans) if n not in self._started]
            if left:
                self._start_at(min(left))
        self._ended.put(run)


def watch(patch, mixture, *, eager):
    """Tell a mixture of each pass, and note where memory grows beyond the limit for more than
    one run. eager: let runs begin without room for them, so that more of them are set back."""
    failures = []
    read, grow = Passes.read, BlockPool._grow

    def reading(self, runs):
        mixture.before_pass()
        read(self, runs)

    def growing(self):
        grow(self)
        excess = self.budget.taken - self.budget.limit
        users = [use.run for cache, use in ENGINE.memory._uses.items() if cache.has_blocks]
        holders = {run.number for run in users if run is not None}
        if excess > 0 and len(holders) > 1:
            failures.append((excess, holders))

    patch.setattr(Passes, "read", reading)
    patch.setattr(BlockPool, "_grow", growing)
    if eager:
        patch.setattr(Passes, "has_room", lambda self, rows: True)
    return failures


def check_mixture(plans, blocks, seed, eager):
    mixture = Mixture(plans, seed)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", gptk.PluginWarning)
        failures = watch(patch, mixture, eager=eager)
        if blocks is None:
            mixture.run()
        else:
            with memory_for(LM, blocks):
                mixture.run()
    assert not failures
    for plan, run in zip(plans, mixture.runs, strict=True):
        check_run(plan, run, seed)
    assert ENGINE.rows_in_use == 0
    assert ENGINE.passes(LM.model).pool.used == ENGINE.passes(OTHER.model).pool.used == 0


def check_run(plan, run, seed):
    chosen = {"seed": seed, **plan.request.settings}
    try:
        result = run.result()
    except CancelledError:
        assert plan.cancelled is not None
        return
    except gptk.PluginError:
        assert plan.request.settings["processors"] == FAILING["processors"]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gptk.PluginWarning)
        alone = plan.lm.generate(plan.request.prompt, **{**chosen, "observers": []})
    check_equal(result, alone, plan)


relaxed = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=10, **relaxed)
@given(mixtures, budgets, seeds, st.booleans())
def test_mixtures(plans, blocks, seed, eager):
    check_mixture(plans, blocks, seed, eager)


@pytest.mark.slow
@settings(max_examples=MANY, **relaxed)
@given(mixtures, budgets, seeds, st.booleans())
def test_many_mixtures(plans, blocks, seed, eager):
    """GPTK_TEST_MIXTURES: how many, instead of 200."""
    check_mixture(plans, blocks, seed, eager)
