"""Penalties on tokens and lengths, and what every processor that penalizes or bans keeps.

Their definitions here are Counter's and transformers'; bans and biases are in test_bans.py.
"""

from collections import Counter

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk import testing
from gptk.plugins.creating import create
from gptk.plugins.registry import provided

VOCABULARY = 16
EOS = 7


def make(spec):
    return create("processor", spec, gptk.LogitsProcessor)


def apply(spec, scores, prompts, news=None, eos=(EOS,)):
    """A processor's result for scores after prompts and the new tokens of each row."""
    news = news or [[] for _ in prompts]
    rows = gptk.Rows(prompts, eos=eos)
    process = make(spec).start(rows)
    followers = [rows, process] if isinstance(process, gptk.Follower) else [rows]
    longest = max(map(len, news))
    if longest:
        padded = torch.tensor([new + [0] * (longest - len(new)) for new in news])
        for follower in followers:
            follower.extend(padded)
            follower.rewind([longest - len(new) for new in news])
    before = scores.clone()
    got = process(scores, rows)
    assert torch.equal(scores, before)
    assert got.dtype == torch.float32
    assert got.shape == scores.shape
    return got


def logits(rows=3):
    return testing.logits(rows, VOCABULARY)


def texts(max_size=14):
    """Texts of few different tokens, so that they repeat themselves."""
    return st.lists(st.integers(0, 7), max_size=max_size)


def batches(rows=3):
    """Prompts and new tokens of unequal lengths."""
    prompt = texts().filter(bool)
    return st.tuples(
        st.lists(prompt, min_size=rows, max_size=rows),
        st.lists(texts(6), min_size=rows, max_size=rows),
    )


# Each with a map of token ids, so that options can be permuted along with the vocabulary.
PROCESSORS = {
    "frequency-penalty": lambda m: "frequency-penalty:penalty=0.7",
    "frequency-penalty of the prompt": lambda m: "frequency-penalty:penalty=-0.7,prompt=true",
    "presence-penalty": lambda m: "presence-penalty:penalty=0.7",
    "dry": lambda m: (
        f"dry:base=1.3,allowed_length=1,sequence_breakers={[[m(3)], [m(4), m(5)], m(6)]}"
    ),
    "no-repeat-ngram": lambda m: "no-repeat-ngram:size=2",
    "min-new-tokens": lambda m: "min-new-tokens:n=3",
    "suppress-tokens": lambda m: f"suppress-tokens:tokens={[m(1), m(13)]}",
    "suppress-tokens at the beginning": lambda m: (
        f"suppress-tokens:tokens={[m(1), m(13)]},begin=true"
    ),
    "bad-words": lambda m: f"bad-words:words={[[m(3)], [m(4), m(5)], [m(1), m(1), m(2)]]}",
    "logit-bias": lambda m: f"logit-bias:bias={[[m(3), -3.5], [m(9), 2.25]]}",
    "sequence-bias": lambda m: (
        f"sequence-bias:biases={[[[m(3)], 1.5], [[m(4), m(5)], -2.0], [[m(1), m(1), m(2)], 4.0]]}"
    ),
    "length-decay": lambda m: "length-decay:after=1,factor=1.25",
    "forced-tokens": lambda m: f"forced-tokens:tokens={[m(8), m(9)]},at=1,eos_at=4",
    "watermark": lambda m: "watermark:context_width=2",
    "watermark selfhash": lambda m: "watermark:seeding_scheme=selfhash,context_width=2",
}
SPECS = {name: build(lambda token: token) for name, build in PROCESSORS.items()}


def test_the_processors_of_this_file_are_built_in():
    assert {name.split()[0] for name in PROCESSORS} <= set(provided("processor"))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@settings(max_examples=25)
@given(scores=logits(), batch=batches())
def test_a_row_gets_what_it_would_get_alone(spec, scores, batch):
    together = apply(spec, scores, *batch)
    for row, (prompt, new) in enumerate(zip(*batch, strict=True)):
        alone = apply(spec, scores[row : row + 1], [prompt], [new])
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@settings(max_examples=25)
@given(scores=logits(), batch=batches())
def test_masked_tokens_stay_masked(spec, scores, batch):
    got = apply(spec, scores, *batch)
    assert (got[scores == -torch.inf] == -torch.inf).all()
    assert not got.isnan().any()
    assert (got < torch.inf).all()


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=n) for n, s in SPECS.items() if n != "length-decay"]
)
@settings(max_examples=25)
@given(scores=logits(), batch=batches(), shift=st.sampled_from([-8.0, 0.5, 16.0]))
def test_a_shift_of_all_logits_makes_no_difference(spec, scores, batch, shift):
    scores = scores + torch.linspace(0, 1e-2, VOCABULARY)  # breaks ties
    got, shifted = (apply(spec, x, *batch).softmax(-1) for x in (scores, scores + shift))
    has_tokens = ~got.isnan().any(dim=1)  # otherwise all tokens are masked
    torch.testing.assert_close(got[has_tokens], shifted[has_tokens], rtol=1e-4, atol=1e-5)
    assert torch.equal(has_tokens, ~shifted.isnan().any(dim=1))


@pytest.mark.parametrize(
    "build", [pytest.param(b, id=n) for n, b in PROCESSORS.items() if "watermark" not in n]
)
@settings(max_examples=25)
@given(scores=logits(), batch=batches(), permutation=st.permutations(range(VOCABULARY)))
def test_the_names_of_tokens_do_not_matter(build, scores, batch, permutation):
    got = apply(build(lambda token: token), scores, *batch)
    renamed = apply(
        build(permutation.__getitem__),
        torch.empty_like(scores).index_copy(1, torch.tensor(permutation), scores),
        *([[permutation[t] for t in row] for row in part] for part in batch),
        eos=(permutation[EOS],),
    )
    assert torch.equal(renamed[:, permutation], got)


NEUTRAL = [
    "frequency-penalty:penalty=0",
    "frequency-penalty:penalty=0,prompt=true",
    "presence-penalty:penalty=0",
    "dry:multiplier=0,sequence_breakers=[]",
    "dry:penalty_last_n=0,sequence_breakers=[]",
    "no-repeat-ngram:size=100",
    "min-new-tokens:n=0",
    "suppress-tokens:tokens=[]",
    "bad-words:words=[]",
    'logit-bias:bias={"3": 0}',
    "logit-bias:bias={}",
    "sequence-bias:biases=[[[3], 0], [[1, 2], 0]]",
    "sequence-bias:biases={}",
    "length-decay:after=0,factor=1",
    "length-decay:after=100,factor=2",
    "forced-tokens:tokens=[3],at=100,eos_at=101",
    "watermark:bias=0",
    "watermark:context_width=100",
]


@pytest.mark.parametrize("spec", NEUTRAL)
@settings(max_examples=15)
@given(scores=logits(), batch=batches())
def test_neutral_options_change_nothing(spec, scores, batch):
    assert torch.equal(apply(spec, scores, *batch), scores)


OF_TEXTS = [
    'suppress-tokens:tokens=["a", 5]',
    'bad-words:words=["a, b", "\\n", "\\"", [1, 2], 3]',
    'logit-bias:bias={"5": 1.5, " a": -2}',
    'logit-bias:bias=[["5", 1.5]]',
    'sequence-bias:biases={"say \\"hi\\"": 1.5}',
    'sequence-bias:biases=[[[1, 2], -0.5], ["5", 1]]',
    'dry:sequence_breakers=["\\n", 5, [1, 2], "\\\\"]',
    'forced-tokens:text="[1, 2]"',
    'forced-tokens:text="null",eos_at=9',
    "length-decay:after=3,factor=1.5",
    "watermark:hashing_key=7,seeding_scheme=selfhash",
]


@pytest.mark.parametrize("spec", [*SPECS.values(), *NEUTRAL, *OF_TEXTS])
def test_a_processor_is_made_again_from_its_spec(spec):
    assert make(make(spec).spec) == make(spec)


# Frequency and presence


@settings(max_examples=60)
@given(
    scores=logits(),
    batch=batches(),
    penalty=st.floats(-2, 2, width=32),
    prompt=st.booleans(),
)
def test_penalties_are_of_counts(scores, batch, penalty, prompt):
    options = f"penalty={penalty},prompt={str(prompt).lower()}"
    frequency = apply(f"frequency-penalty:{options}", scores, *batch)
    presence = apply(f"presence-penalty:{options}", scores, *batch)
    for row, (start, new) in enumerate(zip(*batch, strict=True)):
        counts = Counter(start + new if prompt else new)
        for token in range(VOCABULARY):
            logit = scores[row, token].item()
            count = counts[token]
            assert frequency[row, token].item() == pytest.approx(logit - penalty * count, abs=1e-5)
            least = logit - penalty * (count > 0)
            assert presence[row, token].item() == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([0], [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
        ([0, 1, 2], [0.000023, 0.000023, 0.000023, 0.499966, 0.499966]),
        ([0, 1, 2, 0, 0], [0.000000, 0.000023, 0.000023, 0.499977, 0.499977]),
    ],
)
def test_both_penalties_give_what_llama_cpp_gives(tokens, expected):
    """Its tests/test-sampling.cpp has these numbers, for penalties of 5 and 5."""
    scores = torch.full((1, 5), 0.2).log()
    for name in ("frequency-penalty", "presence-penalty"):
        scores = apply(f"{name}:penalty=5,prompt=true", scores, [tokens])
    assert scores.softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-6)


# Length


@settings(max_examples=60)
@given(
    scores=logits(rows=2),
    new=st.integers(0, 9),
    after=st.integers(0, 6),
    factor=st.floats(0.5, 2),
    eos=st.lists(st.integers(0, 15), min_size=1, max_size=3, unique=True),
)
def test_length_decay_is_transformers(scores, new, after, factor, eos):
    prompts = [[1, 2, 3], [4, 5, 6]]
    news = [[8] * new, [9] * new]
    theirs = transformers.ExponentialDecayLengthPenalty((after, factor), eos, 3)
    ids = torch.tensor([p + n for p, n in zip(prompts, news, strict=True)])
    want = theirs(ids, scores.clone())
    got = apply(f"length-decay:after={after},factor={factor}", scores, prompts, news, eos)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_length_decay_stays_finite():
    scores = torch.randn(1, 10)
    got = apply("length-decay:after=0,factor=1e9", scores, [[1]], [[2] * 500], eos=[3])
    assert got.isfinite().all()
    assert got.softmax(-1)[0, 3] == (1 if scores[0, 3] else 0)
