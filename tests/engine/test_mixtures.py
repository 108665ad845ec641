"""Mixtures of runs of two models that share a budget, which arrive, are cancelled or fail at any
pass: each of the others gives what it gives alone, and nothing is left behind."""

import os
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixtures import (
    LM,
    MORE_STRATEGIES,
    OTHER,
    Mixture,
    Planned,
    Raises,
    alike,
    arrivals,
    budgets,
    check_equal,
    forget,
    memory_for,
    requests_of,
    seeds,
    watch,
)

import gptk
from gptk.engine.engine import ENGINE
from gptk.engine.run import CancelledError

MANY = int(os.environ.get("GPTK_TEST_MIXTURES", "200"))
"""How many mixtures the slow test tries."""

FAILING = {"sampler": "top-p:0.9", "n": 2, "processors": [Raises(after=2)]}

planned = st.builds(
    Planned,
    requests_of([*MORE_STRATEGIES, FAILING], alike()),
    st.sampled_from([LM, OTHER]),
    arrivals,
    st.one_of(st.none(), st.none(), st.integers(0, 20)),
)
mixtures = st.lists(planned, min_size=3, max_size=10)


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
    forget(LM, OTHER)
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
