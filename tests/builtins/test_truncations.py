"""Truncations of the distribution: against transformers, the papers, llama.cpp, and invariants."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptk import LogitsProcessor, OptionError, Rows
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.testing import logits, tiny_lm

MARGIN = 1e-5
"""How far rounding may move the value of an option at which the last token stays or goes."""

# For each processor: the option, its values for x from 0 to 1, and whether more tokens stay as it
# grows. The values are uneven, so that sums of probabilities equal them only by rounding.
TRUNCATIONS = {
    "top-k": ("k", lambda x: 1 + int(39 * x), True),
    "top-p": ("p", lambda x: 0.01237 + 0.97 * x, True),
    "min-p": ("p", lambda x: 0.01237 + 0.97 * x, False),
    "typical": ("p", lambda x: 0.01237 + 0.97 * x, True),
    "epsilon": ("epsilon", lambda x: 0.0001237 + 0.4 * x, False),
    "eta": ("epsilon", lambda x: 0.0001237 + 0.9 * x, False),
    "top-n-sigma": ("n", lambda x: 0.01237 + 5 * x, True),
    "top-h": ("h", lambda x: 0.01237 + 0.97 * x, True),
    "xtc": ("threshold", lambda x: 0.01237 + 0.6 * x, True),
}
LIKELIEST_STAYS = set(TRUNCATIONS) - {"typical", "xtc"}
ORACLES = {
    "top-k": transformers.TopKLogitsWarper,
    "top-p": transformers.TopPLogitsWarper,
    "min-p": transformers.MinPLogitsWarper,
    "typical": transformers.TypicalLogitsWarper,
    "epsilon": transformers.EpsilonLogitsWarper,
    "eta": transformers.EtaLogitsWarper,
    "top-h": transformers.TopHLogitsWarper,
}


def test_every_truncation_here_is_built_in():
    assert set(TRUNCATIONS) <= set(provided("processor"))


def rows_of(count):
    return Rows([[i] for i in range(count)])


def option(name, x):
    return TRUNCATIONS[name][1](x)


def truncation(name, x):
    more = ",probability=1" if name == "xtc" else ""
    return create(
        "processor", f"{name}:{TRUNCATIONS[name][0]}={option(name, x)}{more}", LogitsProcessor
    )


def truncated(name, x, scores):
    return truncation(name, x)(scores, rows_of(len(scores)))


def apply(spec, scores):
    return create("processor", spec, LogitsProcessor)(scores, rows_of(len(scores)))


def kept(name, x, scores):
    return truncated(name, x, scores) > -torch.inf


def of_probabilities(*probabilities):
    return torch.tensor([probabilities]).log()


def shares(scores):
    """The probabilities of the tokens left in a row."""
    p = scores[0].softmax(-1)
    return p[p > 0].tolist()


def grids(rows=3, vocabulary=32):
    """Peaked and flat logits with ties and masked tokens; shifts and differences are exact."""
    values = arrays(np.int8, (rows, vocabulary))
    return st.builds(from_bytes, values, st.sampled_from([8, 64]))


def from_bytes(values, steps):
    scores = torch.from_numpy(values).float() / steps
    scores[torch.from_numpy(values) < -100] = -torch.inf
    scores[(scores == -torch.inf).all(dim=1), 0] = 0
    return scores


def without_ties(scores):
    return scores + torch.linspace(0, 1e-3, scores.shape[1])


def realistic():
    """Four rows of 49,152 logits by Zipf's law, from sharp to flat, the last with half masked."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.empty(4, 49_152)
    for row, slope in enumerate((2.5, 1.5, 0.7, 1.2)):
        ranks = torch.randperm(49_152, generator=generator) + 1
        scores[row] = 12 - slope * ranks.log() + torch.rand(49_152, generator=generator)
    scores[3, ::2] = -torch.inf
    return scores


# Against transformers


def check_against_transformers(name, x, scores):
    """Equal except for tokens within a margin of the option's value, where rounding decides."""
    got = truncated(name, x, scores)
    assert torch.equal(got[got > -torch.inf], scores[got > -torch.inf])
    for row, stays in zip(scores.split(1), (got > -torch.inf).split(1), strict=True):
        low, high = margins(name, option(name, x), row)
        fewest, most = (
            ORACLES[name](value)(torch.zeros(1, 1), row.clone()) > -torch.inf
            for value in ((low, high) if TRUNCATIONS[name][2] else (high, low))
        )
        if name == "typical":  # rounding also decides which of two tokens on either side is nearer
            logits = row.double()
            mean = (logits.softmax(-1) * logits).nansum(-1, keepdim=True)
            distance = (logits - mean).abs()
            fewest = distance < distance[fewest].max() - MARGIN
            most = distance <= distance[most].max() + MARGIN
        assert (fewest <= stays).all(), name
        assert (stays <= most).all(), name


def margins(name, value, scores):
    if name == "top-k":
        return value, value
    if name in (
        "epsilon",
        "eta",
    ):  # the option is compared with single probabilities, which may be small
        return value * (1 - MARGIN), value * (1 + MARGIN)
    margin = MARGIN
    if name == "top-h":
        # A share of the entropy, which is inaccurate if one token has nearly all the probability.
        entropy = torch.special.entr(
            scores.double().topk(min(100, scores.shape[1])).values.softmax(-1)
        )
        margin += 1e-6 / max(float(entropy.sum()), 1e-12)
    return max(value - margin, 1e-9), min(value + margin, 1 - 1e-9)


@settings(max_examples=60)
@given(x=st.floats(0, 1), scores=logits().map(without_ties))
def test_equals_transformers(x, scores):
    for name in ORACLES:
        check_against_transformers(name, x, scores)


@pytest.mark.parametrize("name", ORACLES)
def test_equals_transformers_on_a_vocabulary_of_real_size(name):
    for x in (0, 0.1, 0.5, 0.9, 1):
        check_against_transformers(name, x, realistic())


# Against the papers, transcribed in double precision


@settings(max_examples=60)
@given(x=st.floats(0, 1), scores=grids(rows=2))
def test_typical_is_the_papers_definition(x, scores):
    for row, stays in zip(scores.double(), kept("typical", x, scores), strict=True):
        p = row.softmax(-1).tolist()
        entropy = -math.fsum(q * math.log(q) for q in p if q)
        distance = [abs(-math.log(q) - entropy) if q else math.inf for q in p]

        def reach(mass, p=p, distance=distance):
            """The distance of the token that completes the set."""
            total = 0.0
            for q, d in sorted(zip(p, distance, strict=True), key=lambda pair: pair[1]):
                total += q
                if total >= mass:
                    return d
            return math.inf

        nearer, farther = (reach(option("typical", x) + m) for m in (-MARGIN, MARGIN))
        for d, stay in zip(distance, stays.tolist(), strict=True):
            assert stay or not d < nearer - MARGIN
            assert not stay or d <= farther + MARGIN


@settings(max_examples=60)
@given(x=st.floats(0, 1), scores=grids(rows=2))
def test_top_n_sigma_is_the_papers_definition(x, scores):
    n = option("top-n-sigma", x)
    for row, stays in zip(scores.tolist(), kept("top-n-sigma", x, scores), strict=True):
        finite = [z for z in row if z > -math.inf]
        mean = math.fsum(finite) / len(finite)
        sigma = math.sqrt(math.fsum((z - mean) ** 2 for z in finite) / len(finite))
        least = max(finite) - n * sigma
        for z, stay in zip(row, stays.tolist(), strict=True):
            assert stay == (z >= least) or abs(z - least) < 1e-4


@settings(max_examples=60)
@given(x=st.floats(0, 1), scores=grids(rows=2))
def test_xtc_takes_out_all_good_enough_tokens_but_the_least_likely(x, scores):
    threshold = option("xtc", x)
    for row, stays in zip(scores.double().softmax(-1), kept("xtc", x, scores), strict=True):
        assume((row - threshold).abs().min() > 1e-6)
        good = row[row >= threshold].tolist()
        for p, stay in zip(row.tolist(), stays.tolist(), strict=True):
            assert stay == (p > 0 and (p < threshold or p == min(good))) or p < 1e-30


def test_xtc_strikes_by_the_rows_own_second_number():
    rows = rows_of(400)
    scores = of_probabilities(0.5, 0.3, 0.2).expand(400, -1)
    struck = create("processor", "xtc:probability=0.3", LogitsProcessor)(scores, rows)
    assert torch.equal(struck[:, 0].isinf(), rows.uniform(draw=1) < 0.3)
    assert 0.2 < struck[:, 0].isinf().float().mean() < 0.4
    assert not struck[:, 2].isinf().any()
    never = create("processor", "xtc:probability=0", LogitsProcessor)
    assert torch.equal(never(scores, rows), scores)


# Against the examples that llama.cpp tests its samplers with


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ("top-k:k=1", [1.0]),
        ("top-k:k=3", [0.22222, 0.33333, 0.44444]),
        ("top-p:p=0.7", [0.428571, 0.571429]),
        ("top-p:p=0.8", [0.22222, 0.33333, 0.44444]),
        ("min-p:p=0.24", [0.1, 0.2, 0.3, 0.4]),
        ("min-p:p=0.26", [0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
        ("min-p:p=0.49", [0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
        ("min-p:p=0.51", [0.3 / 0.7, 0.4 / 0.7]),
        ("min-p:p=0.74", [0.3 / 0.7, 0.4 / 0.7]),
        ("min-p:p=0.76", [1.0]),
        ("min-p:p=1", [1.0]),
        ("top-n-sigma:n=1", [0.428571, 0.571429]),
        ("top-n-sigma:n=3", [0.1, 0.2, 0.3, 0.4]),
        ("xtc:probability=1,threshold=0.09", [1.0]),
        ("xtc:probability=1,threshold=0.19", [0.1 / 0.3, 0.2 / 0.3]),
        ("xtc:probability=1,threshold=0.29", [0.1 / 0.6, 0.2 / 0.6, 0.3 / 0.6]),
        ("xtc:probability=1,threshold=0.39", [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_four_tokens_as_in_llama_cpp(spec, left):
    got = apply(spec, of_probabilities(0.1, 0.2, 0.3, 0.4))
    assert shares(got) == pytest.approx(left, abs=1e-5)


def test_typical_as_in_llama_cpp():
    peaked = apply("typical:p=0.5", of_probabilities(0.97, 0.01, 0.01, 0.01))
    assert (peaked > -torch.inf).tolist() == [[True, False, False, False]]
    level = apply("typical:p=0.5", of_probabilities(0.4, 0.2, 0.2, 0.2))
    assert (level > -torch.inf).tolist() == [[False, True, True, True]]


# What every truncation keeps


@given(x=st.floats(0, 1), scores=grids())
def test_some_token_stays_and_what_stays_keeps_its_logit(x, scores):
    before = scores.clone()
    for name in TRUNCATIONS:
        got = truncated(name, x, scores)
        stays = got > -torch.inf
        assert torch.equal(scores, before), name
        assert torch.equal(got[stays], scores[stays]), name
        assert stays.any(dim=1).all(), name
        assert got.dtype == torch.float32


@given(x=st.floats(0, 1), scores=grids(), shift=st.integers(-2000, 2000))
def test_a_constant_added_to_all_logits_changes_nothing(x, scores, shift):
    for name in TRUNCATIONS:
        assert torch.equal(kept(name, x, scores), kept(name, x, scores + shift)), name


@given(x=st.floats(0, 1), scores=grids(), seed=st.integers(0, 1000))
def test_the_order_of_the_vocabulary_makes_no_difference(x, scores, seed):
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    for name in TRUNCATIONS:
        got = truncated(name, x, scores)
        assert torch.equal(truncated(name, x, scores[:, order]), got[:, order]), name


@given(x=st.floats(0, 1), scores=grids())
def test_tokens_that_tie_stay_or_go_together(x, scores):
    for name in TRUNCATIONS:
        for row, stays in zip(scores, kept(name, x, scores), strict=True):
            assert not set(row[stays].tolist()) & set(row[~stays & (row > -torch.inf)].tolist())


@given(x=st.floats(0, 1), scores=grids())
def test_a_row_gets_what_it_would_get_alone(x, scores):
    for name in TRUNCATIONS:
        together = truncated(name, x, scores)
        for row in range(len(scores)):
            alone = truncated(name, x, scores[row : row + 1])
            assert torch.equal(together[row], alone[0]), name


@given(x=st.floats(0, 1), scores=grids())
def test_the_likeliest_stay_and_no_token_before_a_likelier_one(x, scores):
    for name in LIKELIEST_STAYS:
        for row, stays in zip(scores, kept(name, x, scores), strict=True):
            assert stays[row.argmax()], name
            if not stays.all():
                assert row[stays].min() >= row[~stays].max(), name


@given(x=st.floats(0, 1), y=st.floats(0, 1), scores=grids())
def test_a_larger_option_never_does_both_add_and_remove(x, y, scores):
    x, y = sorted((x, y))
    for name, (_, _, grows) in TRUNCATIONS.items():
        small, large = kept(name, x, scores), kept(name, y, scores)
        assert (small <= large).all() if grows else (large <= small).all(), name


@given(x=st.floats(0, 1), scores=grids())
def test_twice_is_once_for_those_that_compare_with_the_likeliest(x, scores):
    for name in ("top-k", "min-p", "epsilon"):
        once = truncated(name, x, scores)
        assert torch.equal(truncated(name, x, once), once), name


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_a_row_with_nothing_left_stays_so_and_leaves_the_others_alone(name):
    scores = torch.cat((torch.full((1, 300), -torch.inf), torch.linspace(-9, 9, 300)[None]))
    got = truncated(name, 0.5, scores)
    assert (got[0] == -torch.inf).all()
    assert torch.equal(got[1:], truncated(name, 0.5, scores[1:]))


# Each by itself


@given(scores=logits(), k=st.integers(1, 50))
def test_top_k_keeps_k_tokens_and_more_only_where_they_tie(scores, k):
    got = apply(f"top-k:k={k}", scores)
    for row, old in zip(got, scores, strict=True):
        stays = row > -torch.inf
        assert int(stays.sum()) >= min(k, int((old > -torch.inf).sum()))
        assert int((row > row[stays].min()).sum()) < k


@given(scores=logits(), p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_reaching_p(scores, p):
    got = apply(f"top-p:p={p}", scores)
    for row, old in zip(got, scores.double().softmax(-1), strict=True):
        stays = row > -torch.inf
        assert old[stays].sum() >= p - MARGIN
        # The tokens likelier than the least likely kept one do not reach p; that one may have ties.
        assert old[old > old[stays].min()].sum() < p + MARGIN


@pytest.mark.parametrize("name", ["top-p", "typical"])
def test_ties_stay_so_that_a_neighbour_never_matters(name):
    tied = torch.zeros(1, 5000).index_fill(1, torch.arange(4700), -9.0)
    flat = torch.linspace(0, 1e-3, 5000)[None]  # so that the search widens for both rows
    alone = apply(f"{name}:p=0.5", tied)
    beside = apply(f"{name}:p=0.5", torch.cat((tied, flat)))
    assert torch.equal(alone[0], beside[0])


@pytest.mark.parametrize("name", ["top-p", "typical"])
@settings(max_examples=40)
@given(x=st.floats(0, 1), seed=st.integers(0, 1000), data=st.data())
def test_equals_transformers_where_many_tokens_are_needed(name, x, seed, data):
    """Flat, by Zipf's law, in steps with ties, and with outliers above and below."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 3000, generator=generator) * data.draw(st.floats(0.001, 3))
    scores[1] = (
        -data.draw(st.floats(0.1, 1.3)) * torch.randperm(3000, generator=generator).add(1).log()
    )
    scores[2, 5], scores[2, 7] = data.draw(st.floats(0, 12)), -data.draw(st.floats(0, 1e6))
    check_against_transformers(name, x, scores)
    stepped = (scores * 8).round() / 8
    for row, stays in zip(stepped, kept(name, x, stepped), strict=True):
        assert not set(row[stays].tolist()) & set(row[~stays].tolist())


@pytest.mark.parametrize("count", [*range(253, 265), 1000, 2999, 3000])
def test_top_p_counts_exactly_where_tokens_are_about_equally_likely(count):
    scores = torch.linspace(0, 1e-4, 3000)[None].flip(1)
    assert int((apply(f"top-p:p={(count - 0.5) / 3000}", scores) > -torch.inf).sum()) == count


@pytest.mark.parametrize("name", ["top-p", "typical"])
def test_all_stay_where_p_is_one_or_cannot_be_told_from_it(name):
    scores = torch.tensor([[0.0, -300.0, 50.0, -torch.inf]])
    assert torch.equal(apply(f"{name}:p=1", scores), scores)
    for size in (*range(3, 200), 255, 256, 257, 5000):
        level = torch.linspace(0, 1, size)[None]
        few = level.masked_fill(torch.arange(size) % 20 > 0, -torch.inf)
        for scores in (level, few, torch.cat((few, level))):
            assert torch.equal(apply(f"{name}:p={1 - 1e-12}", scores), scores)


def test_typical_takes_out_a_token_too_likely_to_be_typical():
    """One token of 0.3 beside many of 0.007, which determine the entropy."""
    scores = of_probabilities(0.3, *[0.007] * 100)
    stays = apply("typical:p=0.6", scores) > -torch.inf
    assert not stays[0, 0]
    assert stays[0, 1:].all()


def test_eta_lets_in_what_epsilon_takes_out_where_the_model_is_unsure():
    unsure = torch.linspace(0, 0.1, 1000)[None]
    sure = torch.tensor([[0.0] * 999 + [12.0]])
    left = {
        name: [int((apply(f"{name}:epsilon=0.001", s) > -torch.inf).sum()) for s in (unsure, sure)]
        for name in ("epsilon", "eta")
    }
    assert left["eta"][0] == 1000
    assert left["epsilon"][0] < 600
    assert left["eta"][1] == left["epsilon"][1] == 1


def test_eta_leaves_equally_likely_tokens_where_rounding_puts_them_below_the_limit():
    for size in range(1, 200):
        level = torch.zeros(1, size)
        assert torch.equal(apply(f"eta:epsilon={1 - 1e-12}", level), level)


def test_top_n_sigma_is_the_same_before_and_after_a_temperature():
    scores = realistic()
    for temperature in (0.25, 4):
        hot = apply("top-n-sigma:n=1.3", scores / temperature)
        assert torch.equal(hot, apply("top-n-sigma:n=1.3", scores) / temperature)


def test_top_h_considers_a_hundred_tokens():
    assert int((apply("top-h:h=1", torch.linspace(0, 1, 500)[None]) > -torch.inf).sum()) == 100


def test_top_h_with_one_certain_token_keeps_it_alone():
    got = apply("top-h:h=1", torch.tensor([[200.0, 0.0, 0.0]]))
    assert (got > -torch.inf).tolist() == [[True, False, False]]


def test_xtc_leaves_a_single_good_token_and_ties_of_the_least_good():
    alone = of_probabilities(0.8, 0.08, 0.07, 0.05)
    assert torch.equal(apply("xtc:probability=1", alone), alone)
    tied = apply("xtc:probability=1", of_probabilities(0.4, 0.25, 0.25, 0.1 - 1e-4, 1e-4))
    assert (tied > -torch.inf).tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize("name", ["top-p", "typical", "min-p", "epsilon", "eta", "top-h", "xtc"])
def test_options_out_of_bounds_are_refused(name):
    for value in (0, -0.5, 1.5):
        with pytest.raises(OptionError, match=f"{TRUNCATIONS[name][0]}={value} is not allowed"):
            create("processor", f"{name}:{TRUNCATIONS[name][0]}={value}", LogitsProcessor)


# The samplers that use them

LM = tiny_lm()


@pytest.mark.parametrize(
    ("sampler", "processor"),
    [
        ("typical:p=0.6", "typical:p=0.6"),
        ("min-p:p=0.3", "min-p:p=0.3"),
        ("top-p:p=0.6", "top-p:p=0.6"),
        ("top-k:k=4", "top-k:k=4"),
    ],
)
def test_a_one_word_strategy_is_multinomial_after_temperature_and_truncation(sampler, processor):
    asked = {"max_new_tokens": 12, "seed": 5, "n": 3}
    short = LM.generate([1, 2, 3], sampler=f"{sampler},temperature=1.3", **asked)
    long = LM.generate(
        [1, 2, 3],
        processors=["temperature:temperature=1.3", processor],
        **asked,
        sampler="multinomial",
    )
    plain = LM.generate([1, 2, 3], sampler="multinomial:temperature=1.3", **asked)
    for want, got in zip((short, *short.alternatives), (long, *long.alternatives), strict=True):
        assert want.tokens == got.tokens
        assert want.token_logprobs == pytest.approx(got.token_logprobs)
    assert short.tokens != plain.tokens
