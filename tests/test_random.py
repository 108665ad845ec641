"""The random streams."""

from hypothesis import given
from hypothesis import strategies as st

from gptk.random import RandomStream


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
