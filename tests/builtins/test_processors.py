"""Logits processors that only reweight: against transformers, and what each of them keeps.

Truncations are in test_truncations.py, penalties and bans in test_penalties.py; what every
processor promises in test_contracts.py.
"""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk import LogitsProcessor, Rows
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.testing import logits, prompts, tiny_lm
from toys import PROCESSOR_OPTIONS as OPTIONS


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


LM = tiny_lm()
SPECS = {
    name: f"{name}:{OPTIONS[name]}" if name in OPTIONS else name
    for name, processor in provided("processor").items()
    if processor.distribution.startswith("gptk-decoding ")
}
BY_SIGN = {"repetition-penalty", "length-decay"}
"""By their definitions these depend on the sign or the size of a logit."""


def shifts(spec, scores, shift, prompt):
    """The distributions after a processor, for logits and for shifted logits."""
    for moved in (scores, scores + shift):
        rows = Rows([prompt], seed=0, eos=(256,), tokenizer=LM.tokenizer, model=LM.model)
        rows.extend(torch.tensor([[7, 9]]))  # so that processors that count new tokens have some
        process = processor(spec).start(rows)
        yield process(moved, rows).softmax(-1)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in BY_SIGN])
@settings(max_examples=15)
@given(seed=st.integers(0, 1000), shift=st.floats(-30, 30), prompt=prompts())
def test_a_constant_added_to_all_logits_changes_no_probability(name, seed, shift, prompt):
    scores = torch.randn(1, 257, generator=torch.Generator().manual_seed(seed)) * 3
    plain, shifted = shifts(SPECS[name], scores, shift, prompt)
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", sorted(BY_SIGN))
def test_two_processors_go_by_the_size_of_a_logit(name):
    scores = torch.randn(1, 257, generator=torch.Generator().manual_seed(0))
    plain, shifted = shifts(SPECS[name], scores, 20, [1, 2])
    assert not torch.allclose(plain, shifted, rtol=0.1)


@settings(max_examples=40)
@given(scores=logits(2, 16), permutation=st.permutations(range(16)), x=st.floats(0.3, 3))
def test_the_names_of_tokens_do_not_matter(scores, permutation, x):
    tokens = [[1, 4, 4], [9]]
    order = torch.tensor(permutation)
    for spec in (f"temperature:temperature={x}", f"repetition-penalty:penalty={x}"):
        got = processor(spec)(scores, rows_of(tokens))
        renamed = processor(spec)(
            torch.empty_like(scores).index_copy(1, order, scores),
            rows_of([[permutation[token] for token in row] for row in tokens]),
        )
        assert torch.equal(renamed[:, order], got)


def test_the_names_of_tokens_do_not_matter_to_guidance():
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    renamed = copy.deepcopy(LM.model)
    with torch.no_grad():
        for mine, its in zip(
            (LM.model.embed.weight, LM.model.head.weight),
            (renamed.embed.weight, renamed.head.weight),
            strict=True,
        ):
            its.index_copy_(0, order, mine)
    scores = torch.randn(1, 257, generator=torch.Generator().manual_seed(1))

    def guided(model, scores, prompt, negative):
        rows = Rows([prompt], model=model)
        return processor(f"cfg:scale=2,negative={negative}").start(rows)(scores, rows)

    got = guided(LM.model, scores, [1, 2], [5, 6])
    other = guided(
        renamed,
        torch.empty_like(scores).index_copy(1, order, scores),
        order[[1, 2]].tolist(),
        order[[5, 6]].tolist(),
    )
    torch.testing.assert_close(other[:, order], got, rtol=1e-5, atol=1e-5)
