"""Logits processors that only reweight: against transformers, and what each of them keeps.

Truncations are in test_truncations.py; what every processor promises in test_contracts.py.
"""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk import LogitsProcessor, Rows
from gptk.plugins import create
from gptk.testing import logits


def rows_of(tokens):
    return Rows(tokens, seed=0, device=torch.device("cpu"))


def processor(spec):
    return create("processor", spec, LogitsProcessor)


ORACLES = {
    "temperature": (
        lambda x: f"temperature:temperature={x + 0.1}",
        lambda x: transformers.TemperatureLogitsWarper(x + 0.1),
    ),
    "repetition-penalty": (
        lambda x: f"repetition-penalty:penalty={0.5 + x}",
        lambda x: transformers.RepetitionPenaltyLogitsProcessor(0.5 + x),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=40)
@given(
    x=st.floats(0, 1),
    scores=logits(),
    tokens=st.lists(st.lists(st.integers(0, 39), min_size=4, max_size=4), min_size=3, max_size=3),
)
def test_equals_transformers(name, x, scores, tokens):
    ours, theirs = ORACLES[name]
    want = theirs(x)(torch.tensor(tokens), scores.clone())
    got = processor(ours(x))(scores, rows_of(tokens))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(scores=logits(), temperature=st.floats(0.01, 100))
def test_temperature_keeps_the_order_of_tokens(scores, temperature):
    got = processor(f"temperature:temperature={temperature}")(scores, rows_of([[1]] * 3))
    order = scores.argsort(dim=-1)
    assert (got.gather(1, order).diff(dim=-1).nan_to_num(0) >= 0).all()


def test_temperature_goes_from_greedy_to_uniform():
    scores = torch.tensor([[0.0, 3.0, -torch.inf, 2.0]])
    rows = rows_of([[1]])
    cold, hot = (
        processor(f"temperature:temperature={t}")(scores, rows).softmax(-1)[0] for t in (1e-3, 1e6)
    )
    assert cold.tolist() == pytest.approx([0, 1, 0, 0])
    assert hot.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=1e-5)


def test_repetition_penalty_ignores_padding():
    scores = torch.ones(2, 10)
    got = processor("repetition-penalty:penalty=2")(scores, rows_of([[5, 6, 7], [3]]))
    assert got[1].tolist() == [1, 1, 1, 0.5, 1, 1, 1, 1, 1, 1]
