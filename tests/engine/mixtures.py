"""What tests of the engine mix: strategies and requests, and what each must be as alone."""

import contextlib
import dataclasses
import queue
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st

import gptk
from gptk import kernels
from gptk.engine.engine import ENGINE
from gptk.engine.passes import Passes
from gptk.engine.run import Run
from gptk.kernels import BLOCK
from gptk.model.pool import BlockPool
from gptk.testing import tiny_lm
from gptk.testing.models import TINY

LM = tiny_lm(dataclasses.replace(TINY, context_length=152, head_dim=32))
"""A model that gptk's kernels can read whole passes with."""
OTHER = tiny_lm(dataclasses.replace(LM.model.config, n_layers=3, n_kv_heads=4), seed=1)
"""A model of the same vocabulary whose blocks have three times the size."""


def sizes_of_passes(monkeypatch, lm=LM):
    """A list of how many tokens each pass of a model reads from now on."""
    sizes = []
    real = lm.model.states_at
    monkeypatch.setattr(
        lm.model,
        "states_at",
        lambda ids, *others: sizes.append(ids.shape[1]) or real(ids, *others),
    )
    return sizes


def block_bytes(lm):
    config = lm.model.config
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim * BLOCK
    return numbers * lm.model.dtype.itemsize


@contextlib.contextmanager
def memory_for(lm, blocks):
    """The memory for keys and values, of all models, is that of so many blocks of this one."""
    gptk.set_kv_memory(blocks * block_bytes(lm))
    try:
        yield
    finally:
        gptk.set_kv_memory(None)


class Raises(gptk.LogitsProcessor):
    name = "raises"
    after: int

    def __call__(self, logits, rows):
        if rows.lengths[0] - rows.prompt_lengths[0] >= self.after:
            raise RuntimeError("on purpose")
        return logits


class RaisingListener(gptk.DecodingListener):
    def __init__(self, after):
        self.after = after

    def step(self, step):
        if step.number >= self.after:
            raise RuntimeError("on purpose")


class RaisingObserver(gptk.DecodingObserver):
    name = "raising-observer"
    after: int

    def start(self, run):
        return RaisingListener(self.after)


STRATEGIES = [
    {"sampler": "greedy"},
    {"sampler": "multinomial"},
    {"sampler": "top-p:0.8", "n": 2},
    {"sampler": "beam:3"},
    {"sampler": "beam:3", "n": 2, "processors": ["no-repeat-ngram:2"]},
    {"sampler": "diverse-beam:width=4,beam_groups=2"},
    {"sampler": "stochastic-beam:3"},
    {"sampler": "contrastive"},
    {"sampler": "dola"},
    {"sampler": "best-of-n:3"},
    {"sampler": "mirostat"},
    {"sampler": "multinomial", "draft": "lookup:ngram=1,tokens=3"},
    {"sampler": "greedy", "draft": LM},
    {"sampler": "greedy", "processors": ["repetition-penalty:1.3", 'regex:pattern="[a-z ]{3,40}"']},
    {"sampler": "multinomial", "processors": ["cfg:scale=1.5,negative=x"]},
    {"sampler": "greedy", "stop": ["e", "q"]},
    {"sampler": "multinomial", "use_cache": False},
    {"sampler": "multinomial", "overflow": "slide"},
]
MORE_STRATEGIES = [
    *STRATEGIES,
    {"sampler": "multinomial", "draft": OTHER},
    {"sampler": "multinomial", "draft": LM, "n": 3, "processors": ["top-k:20"]},
    {"sampler": "beam:3", "processors": ['regex:pattern="[a-f]{2}x*[0-9 ]{2,30}"']},
    {"sampler": "greedy", "draft": OTHER, "processors": ["dry:multiplier=0.8"]},
    {"sampler": "multinomial", "processors": ['json-schema:schema={"type": "integer"}'], "n": 2},
    {"sampler": "greedy", "observers": [RaisingObserver(after=2)]},
    {"sampler": "beam:2", "observers": [RaisingObserver(after=0)]},
]

prompts = st.lists(st.integers(0, 255), min_size=1, max_size=90)
BEGINNINGS = [bytes((3 + number) * i % 256 for i in range(140)) for number in range(3)]


def alike(longest=140):
    """Prompts of up to longest + 8 tokens, many of which begin alike."""
    return st.builds(
        lambda beginning, length, rest: [*beginning[:length], *rest],
        st.sampled_from(BEGINNINGS),
        st.integers(0, longest),
        st.lists(st.integers(0, 255), min_size=1, max_size=8),
    )


def requests_of(strategies, prompts=prompts, most_new=12):
    return st.builds(
        lambda prompt, chosen, new: gptk.Request(
            prompt, settings={**chosen, "max_new_tokens": new}
        ),
        prompts,
        st.sampled_from(strategies),
        st.integers(1, most_new),
    )


requests = requests_of(STRATEGIES)
arrivals = st.integers(0, 6)
budgets = st.one_of(st.none(), st.integers(1, 12), st.integers(8, 24), st.integers(1, 40))
seeds = st.integers(0, 2**16)


def forget(*lms):
    """Nothing is known of texts read before: the next ones are read from their beginnings."""
    for lm in lms:
        ENGINE.call(ENGINE.passes(lm.model).pool.forget_unused)


def flat(result):
    """Of all results of a prompt what can be read, and their numbers."""
    every = [result, *result.alternatives]
    exact = [(each.tokens, each.text, each.finish_reason) for each in every]
    numbers = [number for each in every for number in (each.score, *each.token_logprobs)]
    return exact, numbers


def check_equal(result, alone, what):
    """With gptk's kernels to the last bit; by PyTorch numbers depend on the shape of a pass."""
    (got, numbers), (want, wanted) = flat(result), flat(alone)
    assert got == want, what
    if not kernels.available():
        wanted = pytest.approx(wanted, abs=1e-4)
    assert numbers == wanted, what


def check_as_alone(lm, requests, responses, **common):
    for response in responses:
        assert response.error is None, response.error
        request = requests[response.index]
        ordinal = response.generation.ordinal
        forget(lm)
        alone = lm.generate(request.prompt, **{**common, **request.settings, "ordinal": ordinal})
        check_equal(response.generation, alone, request)


@dataclass
class Planned:
    """A run of a mixture."""

    request: gptk.Request
    lm: gptk.LanguageModel
    arrival: int = 0
    """The pass before which it comes."""
    cancelled: int | None = None
    """The pass before which it is cancelled."""


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
            self._ended.get(timeout=120)

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
