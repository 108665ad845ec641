"""Mirostat: against the paper's two algorithms, and its estimate as the rows move."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk import OptionError, Rows, Sampler
from gptk.plugins.creating import create
from gptk.testing import batches, tiny_lm

LM = tiny_lm()
VERSIONS = [1, 2]
MARGIN = 1e-4
"""In bits: nearer than this to the estimate, rounding may decide whether a token stays."""


def estimate_of(spec, rows=1):
    sampler = create("sampler", spec, Sampler)
    return sampler.processors()[-1].start(Rows([[i] for i in range(rows)]))


def draw(scores, u):
    """The first token whose cumulative probability exceeds u, (1, 1). scores: (1, vocab)."""
    sums = scores[0].double().softmax(-1).cumsum(-1)
    return (sums > u * sums[-1]).int().argmax().reshape(1, 1)


def algorithm_1(probabilities, mu, m=100):
    """How many of the likeliest tokens are left, by Zipf's law."""
    p = sorted(probabilities, reverse=True)
    steps = range(1, min(m, len(p)))
    t = [math.log((i + 1) / i) for i in steps]
    b = [math.log(p[i - 1] / p[i]) for i in steps]
    s = math.fsum(x * y for x, y in zip(t, b, strict=True)) / math.fsum(x * x for x in t)
    epsilon = s - 1
    k = (epsilon * 2**mu / (1 - len(p) ** -epsilon)) ** (1 / s)
    return min(max(1, round(k)), len(p))


def algorithm_2(probabilities, mu):
    """How many tokens are left: those less surprising than mu."""
    return max(1, sum(-math.log2(p) <= mu for p in probabilities))


ALGORITHMS = {1: algorithm_1, 2: algorithm_2}


def distributions(steps=1, rows=1, vocabulary=50):
    """(steps, rows, vocabulary) logits without ties, from sharp to flat."""

    def build(seed, scale):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(steps, rows, vocabulary, generator=generator) * scale

    return st.builds(build, st.integers(0, 10_000), st.floats(0.2, 5))


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=40)
@given(
    scores=distributions(steps=12),
    tau=st.floats(0.3, 6),
    eta=st.floats(0.01, 1),
    u=st.lists(st.floats(0, 0.999), min_size=12, max_size=12),
)
def test_is_the_papers_algorithm(version, scores, tau, eta, u):
    estimate = estimate_of(f"mirostat:version={version},tau={tau},eta={eta},m=30")
    more = {"m": 30} if version == 1 else {}
    mu = 2 * tau
    for step, number in zip(scores, u, strict=True):
        assert estimate.mu[0][-1] == pytest.approx(mu, abs=1e-4)
        got = estimate(step, Rows([[0]]))
        p = step[0].double().softmax(-1)
        fewest, most = (ALGORITHMS[version](p.tolist(), mu + d, **more) for d in (-MARGIN, MARGIN))
        stays = got[0] > -torch.inf
        assert fewest <= int(stays.sum()) <= most
        assert torch.equal(got[0][stays], step[0][stays])
        assert stays.all() or step[0][stays].min() > step[0][~stays].max()
        token = draw(got, number)
        estimate.extend(token)
        mu -= eta * (-math.log2(p[token]) - tau)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("temperature", [1, 1.4])
def test_a_text_is_drawn_as_by_the_papers_algorithm(version, temperature):
    tau, eta = 5, 0.3
    sampler = f"mirostat:version={version},tau={tau},eta={eta},temperature={temperature}"
    out = LM.generate([1, 2, 3], sampler=sampler, max_new_tokens=60, seed=4)
    tokens, mu, counts = [1, 2, 3], 2 * tau, set()
    for token, logprob in zip(out.tokens, out.token_logprobs, strict=True):
        with torch.inference_mode():
            scores = LM.model.logits(LM.model(torch.tensor([tokens])))[0, -1].double()
        p = (scores / temperature).softmax(-1)
        k = ALGORITHMS[version](p.tolist(), mu)
        left = p.topk(k)
        assert token in left.indices
        assert logprob == pytest.approx(math.log(p[token] / left.values.sum()), abs=1e-3)
        mu -= eta * (-math.log2(p[token]) - tau)
        tokens.append(token)
        counts.add(k)
    assert len(counts) > 5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tau", [3.0, 3.5])
def test_the_mean_surprise_comes_to_the_target(version, tau):
    """Drawn from distributions by Zipf's law whose entropy goes from 5.7 to 7.3 bits."""
    estimate = estimate_of(f"mirostat:version={version},tau={tau},eta=0.2")
    generator = torch.Generator().manual_seed(1)
    ranks = torch.arange(1, 2001)
    surprises = []
    for step in range(1500):
        scores = -(1.2 + 0.1 * math.sin(step / 50)) * ranks.log()[None]
        token = draw(estimate(scores, Rows([[0]])), torch.rand(1, generator=generator))
        estimate.extend(token)
        surprises.append(-scores.log_softmax(-1)[0, token].item() / math.log(2))
    assert sum(surprises[100:]) / 1400 == pytest.approx(tau, abs=0.1)
    assert sum(surprises[1000:]) / 500 == pytest.approx(tau, abs=0.2)


@settings(max_examples=60)
@given(
    scores=distributions(steps=20, rows=2, vocabulary=12),
    version=st.sampled_from(VERSIONS),
    looks=st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
def test_what_is_rewound_never_happened(scores, version, looks):
    """Before each token the rows are extended by as many tokens as `looks` says, and rewound."""
    spec = f"mirostat:version={version},tau=1.5,eta=0.7"
    rows = Rows([[0], [1]])
    rewound, plain = estimate_of(spec, 2), estimate_of(spec, 2)
    for step, ahead in enumerate(looks):
        for more in range(ahead):
            rewound(scores[step + more + 3], rows)
            rewound.extend(scores[step + more].argmin(dim=-1, keepdim=True))
        rewound.rewind([ahead, ahead])
        assert rewound.mu == plain.mu
        got = rewound(scores[step], rows)
        assert torch.equal(got, plain(scores[step], rows))
        for estimate in (rewound, plain):
            estimate.extend(got.argmax(dim=-1, keepdim=True))


def test_a_token_in_place_of_one_rewound_counts_by_the_distribution_seen_there():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    rows = Rows([[0]])
    back, straight = (estimate_of("mirostat:tau=1") for _ in range(2))
    back(scores, rows)
    back.extend(torch.tensor([[0]]))
    back.rewind([1])
    back.extend(torch.tensor([[1]]))
    straight(scores, rows)
    straight.extend(torch.tensor([[1]]))
    assert back.mu == straight.mu
    assert back.mu[0][-1] != 2.0


def test_tokens_whose_distribution_was_not_seen_leave_the_estimate_as_it_is():
    scores = torch.tensor([[3.0, 2.0, 1.0, -torch.inf]])
    rows = Rows([[0]])
    estimate = estimate_of("mirostat:tau=1,eta=0.5")
    estimate.extend(torch.tensor([[1, 2]]))
    assert estimate.mu == [[2.0, 2.0, 2.0]]
    estimate(scores, rows)
    estimate.extend(torch.tensor([[1, 2]]))  # only the first one was drawn from the distribution
    moved = 2 - 0.5 * (-scores.log_softmax(-1)[0, 1].item() / math.log(2) - 1)
    assert estimate.mu[0][3:] == pytest.approx([moved, moved])
    estimate.extend(torch.tensor([[0]]))
    assert estimate.mu[0][-1] == estimate.mu[0][-2]
    estimate(scores, rows)
    estimate.extend(torch.tensor([[3]]))  # masked before, so it was not drawn from it
    assert estimate.mu[0][-1] == estimate.mu[0][-2]
    # A distribution computed after tokens that were dropped does not apply to others.
    estimate(scores, rows)
    estimate.rewind([2])
    estimate.extend(torch.tensor([[1, 1]]))
    estimate.extend(torch.tensor([[2]]))
    assert len(set(estimate.mu[0][-4:])) == 1


def test_select_copies_the_estimate_and_its_distribution():
    scores = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.5, 0.0]])
    surprises = (-scores.log_softmax(-1)[:, 1] / math.log(2)).tolist()
    rows = Rows([[0], [1]])
    estimate = estimate_of("mirostat:tau=1,eta=0.1", 2)
    estimate.select([1, 0])  # before the first call
    estimate(scores, rows)
    estimate.extend(torch.tensor([[2], [0]]))
    estimate(scores, rows)
    estimate.select([1, 0, 1])
    before = [mu[-1] for mu in estimate.mu]
    assert before[0] == before[2] != before[1]
    estimate.extend(torch.tensor([[1], [1], [1]]))
    after = [mu[-1] for mu in estimate.mu]
    moved = [mu - 0.1 * (surprises[row] - 1) for mu, row in zip(before, (1, 0, 1), strict=True)]
    assert after == pytest.approx(moved)
    estimate.rewind([1, 0, 0])
    assert [len(mu) for mu in estimate.mu] == [2, 3, 3]
    assert [mu[-1] for mu in estimate.mu] == [before[0], *after[1:]]


def test_select_copies_the_position_of_the_distribution():
    scores = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    estimate = estimate_of("mirostat:tau=1", 2)
    estimate.extend(torch.tensor([[0], [0]]))
    estimate(scores, Rows([[0], [1]]))
    estimate.rewind([1, 0])  # row 0 is no longer where the distribution was computed
    estimate.select([1, 0, 0])
    estimate.extend(torch.tensor([[1], [1], [1]]))
    assert [mu[-1] == mu[-2] for mu in estimate.mu] == [False, True, True]


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=10)
@given(batch=batches(max_prompts=3), seed=st.integers(0, 100))
def test_each_row_of_a_batch_has_its_own_estimate(version, batch, seed):
    unique = [list(p) for p in dict.fromkeys(map(tuple, batch))]
    asked = {
        "sampler": f"mirostat:version={version},tau=2,eta=0.5",
        "seed": seed,
        "max_new_tokens": 10,
        "n": 2,
    }
    for prompt, batched in zip(unique, LM.generate_batch(unique, **asked), strict=True):
        alone = LM.generate(prompt, ordinal=batched.ordinal, **asked)
        assert batched.tokens == alone.tokens
        assert batched.alternatives[0].tokens == alone.alternatives[0].tokens


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("draft", ["lookup:ngram=1,tokens=4", LM, tiny_lm(seed=1)])
def test_with_a_draft_the_text_is_the_same(version, draft):
    asked = {
        "sampler": f"mirostat:version={version},tau=2,eta=0.5",
        "max_new_tokens": 24,
        "n": 3,
    }
    for seed in range(4):
        plain = LM.generate_batch([[1, 2, 1, 2], [3]], seed=seed, **asked)
        drafted = LM.generate_batch([[1, 2, 1, 2], [3]], seed=seed, draft=draft, **asked)
        for want, got in zip(plain, drafted, strict=True):
            assert want.tokens == got.tokens
            assert want.token_logprobs == pytest.approx(got.token_logprobs, abs=1e-3)
            for other_want, other_got in zip(want.alternatives, got.alternatives, strict=True):
                assert other_want.tokens == other_got.tokens


@pytest.mark.parametrize("version", VERSIONS)
def test_extremes_leave_a_token_and_no_more_than_there_are(version):
    rows = Rows([[0]])
    level, certain, single = torch.zeros(1, 500), torch.zeros(1, 500), torch.zeros(1, 500)
    certain[0, 7] = 500
    single[0, 1:] = -torch.inf
    for spec in ("tau=0.001", "tau=5", "tau=5000"):
        estimate = estimate_of(f"mirostat:version={version},{spec}")
        assert (estimate(level, rows) > -torch.inf).all()  # equally likely tokens stay together
        assert estimate(certain, rows)[0, 7] == 500
        assert (estimate(single, rows) > -torch.inf).sum() == 1
        assert (estimate(torch.full((1, 500), -torch.inf), rows) == -torch.inf).all()
    zipf = -torch.arange(1, 501).log()[None]
    assert (estimate(zipf, rows) > -torch.inf).all()
    assert (estimate_of(f"mirostat:version={version},tau=0.01")(zipf, rows) > -torch.inf).sum() == 1


def test_version_1_fits_zipfs_law_to_the_tokens_that_are_left():
    scores = -1.3 * torch.arange(1, 501).log()[None]
    few = scores.masked_fill(torch.arange(500) >= 40, -torch.inf)
    counts = [
        int((estimate_of("mirostat:version=1,tau=2.2")(logits, Rows([[0]])) > -torch.inf).sum())
        for logits in (scores, few)
    ]
    assert 1 < counts[0] == counts[1] < 40


@pytest.mark.parametrize("tau", [5, 12])
def test_version_1_gives_each_row_its_own_count(tau):
    """Also more than the m tokens that Zipf's law is fitted to, and all of them."""
    scores = -torch.tensor([[2.4], [1.0], [0.4]]) * torch.arange(1, 5001).log()
    together = estimate_of(f"mirostat:version=1,tau={tau}", 3)(scores, Rows([[0], [1], [2]]))
    counts = (together > -torch.inf).sum(-1).tolist()
    assert counts == [algorithm_1(row.double().softmax(-1).tolist(), 2 * tau) for row in scores]
    assert min(counts) < 2000
    assert max(counts) == (5000 if tau == 12 else 120)


def test_options_out_of_bounds_are_refused():
    for option in ("version=3", "tau=0", "eta=-1", "m=1"):
        with pytest.raises(OptionError, match=r"sampler mirostat: .* is not allowed"):
            create("sampler", f"mirostat:{option}", Sampler)
