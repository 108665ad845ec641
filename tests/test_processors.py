"""Logits processors: against transformers, and the invariants each of them keeps."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk import LogitsProcessor, Rows
from gptk.plugins import create, provided
from toys import logits


def rows_of(tokens):
    return Rows(tokens, seed=0, device=torch.device("cpu"))


def processor(spec):
    return create("processor", spec, LogitsProcessor)


ORACLES = {
    "temperature": (
        lambda x: f"temperature:temperature={x + 0.1}",
        lambda x: transformers.TemperatureLogitsWarper(x + 0.1),
    ),
    "top-k": (
        lambda x: f"top-k:k={int(40 * x) + 1}",
        lambda x: transformers.TopKLogitsWarper(int(40 * x) + 1),
    ),
    "top-p": (
        lambda x: f"top-p:p={0.01 + 0.98 * x}",
        lambda x: transformers.TopPLogitsWarper(0.01 + 0.98 * x),
    ),
    "min-p": (
        lambda x: f"min-p:p={0.01 + 0.98 * x}",
        lambda x: transformers.MinPLogitsWarper(0.01 + 0.98 * x),
    ),
    "repetition-penalty": (
        lambda x: f"repetition-penalty:penalty={0.5 + x}",
        lambda x: transformers.RepetitionPenaltyLogitsProcessor(0.5 + x),
    ),
}


def test_every_built_in_processor_has_an_oracle():
    assert set(ORACLES) == set(provided("processor"))


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=40)
@given(
    x=st.floats(0, 1),
    scores=logits().map(lambda t: t + torch.linspace(0, 1e-3, t.shape[1])),
    tokens=st.lists(st.lists(st.integers(0, 39), min_size=4, max_size=4), min_size=3, max_size=3),
)
def test_equals_transformers(name, x, scores, tokens):
    ours, theirs = ORACLES[name]
    want = theirs(x)(torch.tensor(tokens), scores.clone())
    got = processor(ours(x))(scores, rows_of(tokens))
    if name == "top-p":
        # Where the mass up to a token is p but for rounding, both answers are right.
        probabilities = scores.double().softmax(-1)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        before = probabilities.gather(1, order).cumsum(-1) - probabilities.gather(1, order)
        sure = torch.zeros_like(scores, dtype=torch.bool)
        sure.scatter_(1, order, (before - processor(ours(x)).p).abs() > 1e-5)
        got, want = got[sure], want[sure]
    assert torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


SPECS = ["temperature:temperature=0.7", "top-k:k=3", "top-p:p=0.6", "min-p:p=0.2"]
SPECS.append("repetition-penalty:penalty=1.7")


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=40)
@given(scores=logits(), data=st.data())
def test_a_row_gets_what_it_would_get_alone(spec, scores, data):
    tokens = [data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=6)) for _ in scores]
    together = processor(spec)(scores, rows_of(tokens))
    for row in range(len(tokens)):
        alone = processor(spec)(scores[row : row + 1], rows_of([tokens[row]]))
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("spec", SPECS)
@given(scores=logits())
def test_input_is_not_changed_and_masked_tokens_stay_masked(spec, scores):
    before = scores.clone()
    got = processor(spec)(scores, rows_of([[1, 2], [3], [4]]))
    assert torch.equal(scores, before)
    assert got[before.isinf()].isinf().all()
    assert (got.amax(dim=-1) > -torch.inf).all()
    assert got.dtype == torch.float32


@given(scores=logits(), k=st.integers(1, 50))
def test_top_k_keeps_k_tokens_none_less_likely_than_one_taken_out(scores, k):
    got = processor(f"top-k:k={k}")(scores, rows_of([[1]] * 3))
    for row, old in zip(got, scores, strict=True):
        kept = row > -torch.inf
        possible = int((old > -torch.inf).sum())
        assert int(kept.sum()) >= min(k, possible)
        # More than k only where tokens tie with the k-th.
        assert int((row > row[kept].min()).sum()) < k
        assert torch.equal(row[kept], old[kept])


@given(scores=logits(), p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_reaching_p(scores, p):
    got = processor(f"top-p:p={p}")(scores, rows_of([[1]] * 3))
    for row, old in zip(got, scores.double().softmax(-1), strict=True):
        kept = row > -torch.inf
        mass = old[kept].sum()
        assert mass >= p - 1e-5
        # All that are likelier than the least likely kept one fall short; that one may have ties.
        assert old[old > old[kept].min()].sum() < p + 1e-5
        assert old[kept].min() >= old[~kept].max() if (~kept).any() else True


def test_top_p_keeps_ties_so_that_a_neighbour_never_matters():
    tied = torch.zeros(1, 5000).index_fill(1, torch.arange(4700), -9.0)
    flat = torch.linspace(0, 1e-3, 5000)[None]  # makes the search widen for both rows
    alone = processor("top-p:p=0.5")(tied, rows_of([[1]]))
    beside = processor("top-p:p=0.5")(torch.cat((tied, flat)), rows_of([[1], [1]]))
    assert torch.equal(alone[0], beside[0])


def test_top_p_widens_until_a_flat_distribution_reaches_p():
    scores = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * 0.01
    kept = (processor("top-p:p=0.9")(scores, rows_of([[1], [2]])) > -torch.inf).sum(-1)
    want = transformers.TopPLogitsWarper(0.9)(torch.tensor([[1], [2]]), scores)
    assert (kept - (want > -torch.inf).sum(-1)).abs().max() <= 2
    assert kept.min() > 4000


def test_repetition_penalty_ignores_padding():
    scores = torch.ones(2, 10)
    got = processor("repetition-penalty:penalty=2")(scores, rows_of([[5, 6, 7], [3]]))
    assert got[1].tolist() == [1, 1, 1, 0.5, 1, 1, 1, 1, 1, 1]
