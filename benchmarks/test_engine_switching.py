"""The engine's own time beside its passes: switching among 1,000 runs costs under 5 % of a pass.

A run here reads one token after another and does nothing with their logits, so that no sampler's
work is counted. What they take together beyond `read_parts` and `GPT.logits` is the engine's
time: greenlets, choosing what a pass takes, blocks, and handing out states and logits. Measured is
the processor time of the engine's thread, which other programs on the machine do not change much.
"""

import statistics
import time

import pytest
import torch

from gptk.engine import engine
from gptk.engine import passes as passes_of_engine
from gptk.engine.engine import ENGINE
from gptk.engine.run import Run
from gptk.model.passes import read_parts
from models import load

RUNS, STEPS = 1000, 32


def read_tokens(model):
    """What a run does."""
    model = ENGINE.joined(model)
    cache = model.new_cache(1, STEPS)
    token = torch.tensor([[5]])
    for _ in range(STEPS):
        model.states_and_logits(token, cache)


def timed(function, seconds):
    """The function, whose time is added to a list."""

    def run(*args, **settings):
        start = time.thread_time()
        result = function(*args, **settings)
        seconds.append(time.thread_time() - start)
        return result

    return run


@pytest.mark.parametrize("rows", [engine.MOST_ROWS, RUNS])
@pytest.mark.parametrize("dtype", ["kept", "bfloat16"])
def test_switching(dtype, rows, report, request, monkeypatch):
    model = load("smollm2", dtype).model
    monkeypatch.setattr(engine, "MOST_ROWS", rows)
    passes = ENGINE.passes(model)
    shares, each = [], []
    for _ in range(5 if request.config.option.full else 2):
        in_model = []
        with monkeypatch.context() as patch:
            patch.setattr(passes_of_engine, "read_parts", timed(read_parts, in_model))
            patch.setattr(model, "logits", timed(model.logits, in_model))
            runs = [Run(lambda: read_tokens(model), 1) for _ in range(RUNS)]
            count, start = passes.count, ENGINE.call(time.thread_time)
            ENGINE.start(runs)
            for run in runs:
                run.result()
            own = ENGINE.call(time.thread_time) - start - sum(in_model)
        count = passes.count - count
        shares.append(own / sum(in_model))
        each.append((1e3 * own / count, 1e3 * sum(in_model) / count))
    own_ms, model_ms = each[shares.index(statistics.median_low(shares))]
    report(
        f"switching among {RUNS:,} runs, {rows:,} under way, {dtype}: {own_ms:.2f} ms beside a "
        f"pass of {model_ms:.2f} ms, {100 * statistics.median_low(shares):.1f} %"
    )
