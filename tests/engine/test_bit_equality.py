"""Random batches of all samplers, with processors, constraints and drafts: what each run's sampler
sees at each step, and its results, are to the last bit those of the same run alone."""

import contextlib
import dataclasses
import itertools
import os
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mixtures import (
    Mixture,
    Planned,
    alike,
    arrivals,
    check_equal,
    forget,
    memory_for,
    requests_of,
    seeds,
    watch,
)

import gptk
from gptk import kernels
from gptk.engine import passes
from gptk.engine.memory import Memory
from gptk.model.blocks import BlockCache
from gptk.plugins import create, provided
from gptk.testing import tiny_gpt
from gptk.testing.models import TINY
from toys import PROCESSOR_OPTIONS

pytestmark = pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")

BATCHES = int(os.environ.get("GPTK_TEST_BATCHES", "4"))
"""How many batches the slow test tries for each sampler."""

CONSTRAINTS = ["choice", "grammar", "json-schema", "regex"]
PROCESSORS = [name for name in provided("processor") if name not in CONSTRAINTS]
DRAFT = object()
"""Stands for the model that drafts for another."""


def spec(name):
    return f"{name}:{PROCESSOR_OPTIONS[name]}" if name in PROCESSOR_OPTIONS else name


def strategies_by_sampler():
    """For each sampler: alone, with some of the processors, with a constraint, and with what else
    it takes, several results and drafts. All processors and constraints are among them."""
    processors, constraints = map(itertools.cycle, (PROCESSORS, CONSTRAINTS))
    strategies = {}
    for name, plugin in provided("sampler").items():
        chosen = {"sampler": f"{name}:{plugin.item.example}" if plugin.item.example else name}
        sampler = create("sampler", chosen["sampler"], gptk.Sampler)
        strategies[name] = [
            chosen,
            {**chosen, "processors": [spec(next(constraints))]},
            *({**chosen, "processors": [spec(next(processors))]} for _ in range(2)),
        ]
        if sampler.random:
            strategies[name].append({**chosen, "n": 2})
        if sampler.refuses_draft() is None:
            strategies[name] += [
                {**chosen, "draft": "lookup:ngram=1,tokens=3"},
                {**chosen, "draft": DRAFT, "processors": [spec(next(processors))]},
            ]
    return strategies


STRATEGIES = strategies_by_sampler()


class Recorder(gptk.DecodingObserver):
    """Keeps all steps of a run."""

    name = "recorder"
    steps: object

    def start(self, run):
        return RecordingListener(self.steps)


class RecordingListener(gptk.DecodingListener):
    def __init__(self, steps):
        self._steps = steps

    def step(self, step):
        self._steps.append(step)


@dataclasses.dataclass
class Batch:
    plans: list[Planned]
    seed: int
    blocks: int | None
    """What the budget has room for, while runs begin without room for them. None: all."""
    most_tokens: int
    """Of a pass: longer prompts are split."""


def batches(lms, sampler, *, longest, most_new, most_runs):
    """Batches of runs of the first model, of which the first has this sampler, the others any. The
    second model drafts."""

    def planned(strategies):
        strategies = [
            {**chosen, "draft": lms[1]} if chosen.get("draft") is DRAFT else chosen
            for chosen in strategies
        ]
        requests = requests_of(strategies, alike(longest), most_new)
        return st.builds(Planned, requests, st.just(lms[0]), arrivals)

    of_any = planned(itertools.chain(*STRATEGIES.values()))
    return st.builds(
        Batch,
        st.builds(
            lambda first, others: [first, *others],
            planned(STRATEGIES[sampler]),
            st.lists(of_any, min_size=1, max_size=most_runs - 1),
        ),
        seeds,
        st.one_of(st.none(), st.integers(1, 6)),
        st.sampled_from([7, 32, 100]),
    )


def check_batch(batch, lms, seen):
    """seen: counts what the batch had of what could make a difference."""
    together = [[] for _ in batch.plans]
    recorded = [with_observer(*pair) for pair in zip(batch.plans, together, strict=True)]
    forget(*lms)
    with pytest.MonkeyPatch.context() as patch, limited(batch, lms[0]):
        read_at_most(patch, batch.most_tokens)
        count_events(patch, seen)
        mixture = Mixture(recorded, batch.seed)
        failures = watch(patch, mixture, eager=True)
        mixture.run()
    assert not failures
    for plan, run, steps in zip(batch.plans, mixture.runs, together, strict=True):
        seen["split prompt"] += len(plan.request.prompt) > batch.most_tokens
        seen.update(plan.request.settings.keys())
        forget(*lms)
        want, steps_alone = alone(plan, batch.seed)
        check_outcome(outcome(run.result), want, batch)
        assert len(steps) == len(steps_alone), batch
        for pair in zip(steps, steps_alone, strict=True):
            check_step(*pair, batch)


def alone(plan, seed):
    """What a run comes to that reads its prompt in a single pass, and its steps."""
    steps = []
    chosen = with_observer(plan, steps).request
    with pytest.MonkeyPatch.context() as patch:
        read_at_most(patch, 1 << 20)
        found = outcome(lambda: plan.lm.generate(chosen.prompt, seed=seed, **chosen.settings))
    return found, steps


def with_observer(plan, steps):
    """The plan with an observer that keeps all steps in this list."""
    chosen = {**plan.request.settings, "observers": [Recorder.model_construct(steps=steps)]}
    return dataclasses.replace(plan, request=gptk.Request(plan.request.prompt, settings=chosen))


def limited(batch, lm):
    return contextlib.nullcontext() if batch.blocks is None else memory_for(lm, batch.blocks)


def read_at_most(patch, tokens):
    """A pass reads at most so many tokens."""
    for name in ("TOKENS", "TOKENS_IN_16_BITS"):
        patch.setattr(passes, name, tokens)


def count_events(patch, seen):
    recall, set_back = BlockCache.recall, Memory.set_back

    def recalling(self, texts):
        recall(self, texts)
        seen["shared beginning"] += any(self.held)

    def setting_back(self, run, budget):
        found = set_back(self, run, budget)
        seen["set back"] += found is not None and found[1] is not None
        return found

    patch.setattr(BlockCache, "recall", recalling)
    patch.setattr(Memory, "set_back", setting_back)


def outcome(result):
    """The result, or the message of its error, such as that no token is left to choose from."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gptk.PluginWarning)
            return result()
    except gptk.GptkError as error:
        return str(error)


def check_outcome(got, want, what):
    if isinstance(want, str):
        assert got == want, what
    else:
        check_equal(got, want, what)


def check_step(got, want, what):
    """Rows that wait have no logits yet."""
    assert got.waiting == want.waiting, what
    lengths = [[(row.length, row.total) for row in step.rows] for step in (got, want)]
    assert lengths[0] == lengths[1], what
    known = ~torch.tensor(got.waiting)
    for name in ("logits", "processed"):
        assert torch.equal(getattr(got, name)[known], getattr(want, name)[known]), what
    if known.all():
        for name in ("tokens", "logprobs", "scores"):
            assert torch.equal(getattr(got.choice, name), getattr(want.choice, name)), what
        assert got.parents == want.parents, what


def small_lms(dtype, quantize):
    """A small model in a precision, in the layout of gptk's kernels, and one that drafts for it."""
    config = dataclasses.replace(TINY, context_length=192, width=64, head_dim=32, mlp_width=96)
    lms = []
    for noise in (0, 0.05):
        model = tiny_gpt(config).to(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * torch.randn(weight.shape).to(dtype)
        if quantize is not None:
            model.quantize(quantize)
        lms.append(gptk.LanguageModel(model.eval().pack(), gptk.load_tokenizer("bytes")))
    return lms


relaxed = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}


def check_batches(pairs, samplers, count, **sizes):
    """Try so many batches for each of the samplers. What they had must be of every kind."""
    seen = Counter()
    for number, sampler in enumerate(samplers):
        check_sampler(pairs, sampler, count, seen, number, **sizes)
    assert set(+seen) >= EVENTS | set(range(len(pairs))), seen


def check_sampler(pairs, sampler, count, seen, number, **sizes):
    """Try batches with this sampler. seen: counts which settings how many runs had, which of the
    pairs of models how many batches had, and what happened in them."""

    @seed(number)
    @settings(max_examples=1 + count, **relaxed)  # the first is the smallest that there is
    @given(st.data(), st.sampled_from(range(len(pairs))))
    def check(data, pair):
        check_batch(data.draw(batches(pairs[pair], sampler, **sizes)), pairs[pair], seen)
        seen[pair] += 1

    check()


EVENTS = {"split prompt", "shared beginning", "set back", "draft", "processors", "n"}


def test_a_run_sees_the_same_bits_alone_and_in_a_batch():
    kinds = (torch.float32, None), (torch.bfloat16, None), (torch.float32, "int4")
    pairs = [small_lms(*kind) for kind in kinds]
    check_batches(pairs, list(STRATEGIES)[::4], 3, longest=140, most_new=8, most_runs=6)


@pytest.mark.slow
def test_all_samplers_see_the_same_bits_of_smollm2(smollm2_path):
    """In float32, in bfloat16, and with the weights as they are stored. GPTK_TEST_BATCHES: how many
    batches for each sampler, instead of 4."""
    kinds = {"quantize": "none"}, {"quantize": "none", "dtype": "bfloat16"}, {}
    lms = [gptk.load(str(smollm2_path), device="cpu", **kind) for kind in kinds]
    pairs = [(lm, lms[2] if lm is not lms[2] else lms[1]) for lm in lms]
    check_batches(pairs, STRATEGIES, BATCHES, longest=140, most_new=6, most_runs=5)
