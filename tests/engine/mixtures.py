"""What tests of the engine mix: strategies and requests, and what each must be as alone."""

import contextlib
import dataclasses

import pytest
from hypothesis import strategies as st

import gptk
from gptk.kernels import BLOCK
from gptk.testing import tiny_lm
from gptk.testing.models import TINY

LM = tiny_lm(dataclasses.replace(TINY, context_length=152))
OTHER = tiny_lm(dataclasses.replace(LM.model.config, n_layers=3, n_kv_heads=4), seed=1)
"""A model of the same vocabulary whose blocks have three times the size."""


def block_bytes(lm):
    config = lm.model.config
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * BLOCK * 4


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
alike = st.builds(
    lambda beginning, length, rest: [*beginning[:length], *rest],
    st.sampled_from(BEGINNINGS),
    st.integers(0, 140),
    st.lists(st.integers(0, 255), min_size=1, max_size=8),
)
"""Prompts of up to 148 tokens, many of which begin alike."""


def requests_of(strategies, prompts=prompts):
    return st.builds(
        lambda prompt, chosen, new: gptk.Request(
            prompt, settings={**chosen, "max_new_tokens": new}
        ),
        prompts,
        st.sampled_from(strategies),
        st.integers(1, 12),
    )


requests = requests_of(STRATEGIES)


def flat(result):
    """Of all results of a prompt what must be equal, and the numbers that may differ a little."""
    every = [result, *result.alternatives]
    exact = [(each.tokens, each.text, each.finish_reason) for each in every]
    return exact, [number for each in every for number in each.token_logprobs]


def check_equal(result, alone, what):
    (got, numbers), (want, wanted) = flat(result), flat(alone)
    assert got == want, what
    assert numbers == pytest.approx(wanted, abs=1e-4), what


def check_as_alone(lm, requests, responses, **common):
    for response in responses:
        assert response.error is None, response.error
        request = requests[response.index]
        ordinal = response.generation.ordinal
        alone = lm.generate(request.prompt, **{**common, **request.settings, "ordinal": ordinal})
        check_equal(response.generation, alone, request)
