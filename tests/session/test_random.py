"""The random streams."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptk import Rows, kernels
from gptk.session.random import RandomStream, as_keys, columns, draw, exponential


@given(st.integers(), st.lists(st.integers(0, 2**31), max_size=5), st.integers(0, 1000))
def test_numbers_are_reproducible_and_in_the_unit_interval(seed, prompt, index):
    u = RandomStream.of(seed, prompt).uniform(index)
    assert 0 <= u < 1
    assert u == RandomStream.of(seed, prompt).uniform(index)


def test_numbers_are_uniform_over_steps_and_over_streams():
    steps = [RandomStream.of(0, [1]).uniform(i) for i in range(20_000)]
    streams = [RandomStream.of(seed, [1]).uniform(0) for seed in range(20_000)]
    for numbers in (steps, streams):
        # Ten bins of 2,000 expected: a standard deviation is about 42.
        bins = [sum(b / 10 <= u < (b + 1) / 10 for u in numbers) for b in range(10)]
        assert all(abs(count - 2000) < 5 * 42 for count in bins)


STREAM = RandomStream.of(0, [1, 2, 3])
CPU = torch.device("cpu")


def noise(places, size):
    keys = as_keys([STREAM.bits(place) for place in places], CPU)
    return exponential(keys[:, None], columns(size, CPU))


def uniform_noise(places, size):
    """The uniform numbers behind the noise, (places, size)."""
    return -(-noise(places, size).double()).expm1()


def is_even(numbers, bins=16):
    """Whether numbers in [0, 1) fill equal bins as chance has it."""
    counts = (numbers.flatten() * bins).long().clamp(max=bins - 1).bincount(minlength=bins)
    expected = numbers.numel() / bins
    return ((counts - expected) ** 2 / expected).sum() < 60  # 15 degrees of freedom: 1 in 4 million


def test_noise_is_the_same_from_either_kernel(monkeypatch):
    places = [[i] for i in range(30)]
    noises = [noise(places, 5000)]
    monkeypatch.setattr(kernels.checks, "enabled", False)
    noises.append(noise(places, 5000))
    assert noises[0].min() > 0
    assert torch.allclose(*noises, rtol=1e-6, atol=0)


def test_noise_is_exponential_for_every_key_and_every_token():
    drawn = uniform_noise([[i] for i in range(400)], 5000)
    assert is_even(drawn)
    for some in (drawn[0], drawn[1], drawn[:, 0], drawn[:, 1], drawn[:, 4999]):
        assert is_even(some)
    # Extremes are as frequent as they should be: 2 million numbers, 20 below 1e-5 expected.
    for end in (drawn, 1 - drawn):
        assert 5 <= (end < 1e-5).sum() <= 45


def test_noise_of_neighbours_is_independent():
    drawn = uniform_noise([[i] for i in range(400)], 5000) - 0.5
    pairs = {
        "tokens": (drawn[:, :-1], drawn[:, 1:]),
        "tokens 256 apart": (drawn[:, :-256], drawn[:, 256:]),
        "positions": (drawn[:-1], drawn[1:]),
        "both": (drawn[:-1, :-1], drawn[1:, 1:]),
    }
    for name, (one, other) in pairs.items():
        correlation = 12 * (one * other).mean()  # its standard deviation is 1 / sqrt(pairs)
        assert abs(correlation) < 5 / one.numel() ** 0.5, name
        # And no pattern in the plane: 8 by 8 cells.
        cells = ((one + 0.5) * 8).long().clamp(0, 7) * 8 + ((other + 0.5) * 8).long().clamp(0, 7)
        counts = cells.flatten().bincount(minlength=64)
        expected = one.numel() / 64
        assert ((counts - expected) ** 2 / expected).sum() < 140, name  # 63 degrees of freedom


def test_noise_is_finite_and_depends_on_key_and_token_alone():
    drawn = noise([[i] for i in range(50)], 50_000)
    assert drawn.isfinite().all()
    assert (drawn > 0).all()
    assert torch.equal(drawn[17:18, :100], noise([[17]], 100))
    assert len({row.sum().item() for row in drawn}) == 50


@given(data=st.data())
def test_a_draw_is_the_token_of_least_noise_over_probability(either_kernels, data):
    rows, size = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 15, 16, 17, 3000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, size, generator=generator) * data.draw(st.sampled_from([1, 30]))
    out = torch.rand(rows, size, generator=generator) < data.draw(st.sampled_from([0, 0.5, 0.99]))
    logits = logits.masked_fill(out, -torch.inf)
    logits[:, data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from([-80.0, 0.0, 80.0]))
    keys = as_keys([RandomStream.of(1, [row]).bits([0]) for row in range(rows)], CPU)
    tokens, logprobs = draw(logits, keys)
    race = exponential(keys[:, None], columns(size, CPU)).double() / logits.double().softmax(-1)
    least = race.amin(dim=-1)
    assert torch.allclose(race.gather(1, tokens[:, None])[:, 0], least, rtol=1e-5)
    want = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), want, rtol=1e-6, atol=1e-5)


def test_noise_is_float32_whatever_the_default(either_kernels):
    given, want = torch.get_default_dtype(), noise([[1]], 100)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(noise([[1]], 100), want)
    finally:
        torch.set_default_dtype(given)


def test_a_row_without_tokens_draws_nothing(either_kernels):
    keys = as_keys([bytes(8), bytes(8)], CPU)
    logits = torch.tensor([[-torch.inf] * 40, [torch.nan] + [0.0] * 39])
    tokens, logprobs = draw(logits, keys)
    assert tokens[0] == 0
    assert logprobs.isnan().all()


def test_noise_of_rows_that_part_is_independent_only_if_asked():
    rows = Rows([[1]])
    rows.select([0, 0])
    rows.extend(torch.tensor([[5], [6]]))
    one, other = rows.exponential(100)
    assert torch.equal(one, other)
    one, other = rows.exponential(100, apart=True)
    assert not (one == other).any()
