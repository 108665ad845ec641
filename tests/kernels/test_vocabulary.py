"""Passes over a vocabulary, by gptk's kernels and without them, compared with float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptk.vocabulary import entropy, keep_from, last_key, logprobs_of, mean, permutation, top

pytestmark = pytest.mark.usefixtures("either_kernels")

INF = math.inf
SIZES = st.sampled_from([1, 2, 15, 16, 17, 33, 1024, 1030, 5000])


@st.composite
def logits(draw, size=SIZES):
    """Logits of one to three rows, of different spreads, some of them masked with -inf."""
    shape = draw(st.integers(1, 3)), draw(size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    numbers = draw(st.sampled_from([0.01, 1, 3, 40])) * torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        numbers = numbers.round()  # for ties
    numbers += draw(st.sampled_from([0, -300, 25]))
    masked = torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.3, 0.98]))
    masked[:, draw(st.integers(0, shape[1] - 1))] = False
    return numbers.masked_fill(masked, -INF)


@given(logits(), st.integers(1, 200))
def test_the_largest_are_found(x, k):
    k = min(k, x.shape[1])
    got = top(x, k)
    assert torch.equal(got.values, x.topk(k).values)
    assert torch.equal(x.gather(1, got.tokens), got.values)
    assert all(len(set(row)) == k for row in got.tokens.tolist())


def test_nan_comes_first_in_top():
    x = torch.zeros(2, 40)
    x[1, 30] = torch.nan
    values, tokens = top(x, 2)
    assert tokens[1, 0] == 30
    assert values[1, 0].isnan()


@given(logits())
def test_sums_are_those_of_float64(x):
    exact = x.double()
    logprobs = exact.log_softmax(-1)
    assert torch.allclose(logprobs_of(x, x).double(), logprobs, rtol=1e-6, atol=2e-6)
    want = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
    assert torch.allclose(entropy(x).double(), want, rtol=1e-5, atol=1e-5)
    want = (logprobs.exp() * exact).nansum(-1, keepdim=True)
    assert torch.allclose(mean(x).double(), want, rtol=1e-6, atol=2e-5)


def test_a_row_without_tokens_has_no_log_probabilities():
    x = torch.full((2, 20), -INF)
    x[1] = 0
    logprobs = logprobs_of(x, x)
    assert logprobs[0].isnan().all()
    assert torch.allclose(logprobs[1], torch.tensor(-math.log(20)))


@given(logits(), st.floats(-50, 50))
def test_keys_below_the_bound_are_masked(x, bound):
    least = torch.full((len(x), 1), bound)
    least[0] = x[0].max()
    assert torch.equal(keep_from(x, least), torch.where(x < least, -INF, x))
    assert torch.equal(keep_from(x, least, -x), torch.where(-x < least, -INF, x))


def test_one_bound_and_one_row_of_keys_are_broadcast_to_all_rows():
    x, keys = torch.zeros(4, 20), torch.arange(20.0)[None] - 10
    for least in (torch.zeros(1, 1), torch.zeros(4, 1)):
        assert (keep_from(x, least, keys) == torch.where(keys < least, -INF, x)).all()


def test_top_of_none_and_of_more_than_there_are():
    assert top(torch.zeros(2, 20), 0).tokens.shape == (2, 0)
    with pytest.raises(RuntimeError, match="out of range"):
        top(torch.zeros(1, 3), 5)


def test_logits_that_require_a_gradient_give_the_same_key():
    x = torch.randn(1, 50, requires_grad=True)
    assert torch.equal(last_key(x.detach(), x, 0.5), last_key(x.detach(), x.detach(), 0.5))


def test_a_long_row_without_tokens_has_no_key():
    x = torch.full((1, 4096), -INF)
    assert last_key(x, x, 0.9).isneginf().all()


def test_keep_from_keeps_nan():
    x = torch.tensor([[torch.nan, 1.0, 3.0]])
    assert keep_from(x, torch.tensor([[2.0]])).isnan().tolist() == [[True, False, False]]


@given(logits(), st.floats(0.01, 0.999), st.booleans())
def test_the_last_key_completes_the_probability(x, p, by_distance):
    """Tokens with at least that key reach the probability p; those with higher keys do not."""
    keys = (x - x.mean(-1, keepdim=True)).abs().neg() if by_distance else x
    keys = keys.nan_to_num(nan=-INF)
    got = last_key(keys, x, p)
    probabilities = x.double().softmax(-1)
    with_it = (probabilities * (keys >= got)).sum(-1)
    without = (probabilities * (keys > got)).sum(-1)
    assert got.shape == (len(x), 1)
    assert (keys == got).any(-1).all()
    assert (with_it >= p - 1e-5).all()
    assert (without < p + 1e-5).all()


def test_a_probability_out_of_reach_gives_the_lowest_key():
    x = torch.zeros(1, 40)
    x[0, :3] = torch.tensor([30.0, 20.0, -40.0])
    assert last_key(x, x, 1 - 2**-53).item() <= 0
    nothing = torch.full((1, 40), -INF)
    assert keep_from(nothing, last_key(nothing, nothing, 0.5)).isneginf().all()


@pytest.mark.parametrize("p", [1e-9, 0.5, 0.9, 0.999])
def test_a_real_vocabulary(p):
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(2, 49_152, generator=generator)
    ordered = x.double().sort(-1, descending=True).values
    mass = ordered.softmax(-1).cumsum(-1)
    got = last_key(x, x, p)
    for row in range(2):
        index = int(torch.searchsorted(mass[row], p))
        near = ordered[row, max(index - 4, 0) : index + 5]  # rounding may move it by a few
        assert near[-1] <= got[row] <= near[0]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 2), st.data())
def test_a_permutation_begins_as_pytorchs_does(either_kernels, size, seed, data):
    count = data.draw(st.integers(0, size))
    whole = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    assert permutation(size, seed, count).tolist() == whole[:count].tolist()
