"""The LZ penalty: against its definition, as a follower of the rows, and in company."""

import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gptk
from gptk.testing import ProcessorContract, prompts, tiny_lm
from gptk_lz_penalty.processor import LZPenalty, Matches

LM = tiny_lm()
VOCABULARY = 12


class TestLZPenalty(ProcessorContract):
    make = LZPenalty


class TestSmallWindow(ProcessorContract):
    """A window and a buffer that short rows fill."""

    def make(self):
        return LZPenalty(strength=1.0, window=5, buffer=2)


def by_definition(tokens, vocabulary, window, buffer):
    """Δ of each token in bits: every sequence of every length is looked for at every place."""
    seen = tokens[-window:]
    end = len(seen)

    def nearest(sequence, begin):
        """How far back from `begin` the sequence stands last, if within what is seen."""
        places = range(min(begin - 1, end - len(sequence)), -1, -1)
        return next((begin - p for p in places if seen[p : p + len(sequence)] == sequence), None)

    matches = [
        (length, distance)
        for length in range(1, min(buffer, end - 1) + 1)
        if (distance := nearest(seen[end - length :], end - length)) is not None
    ]
    l, d = max(matches, default=(0, 0))  # noqa: E741 - as the paper calls it
    bits = []
    for token in range(vocabulary):
        found = [
            (length, distance)
            for length in range(1, min(buffer + 1, end + 1) + 1)
            if (distance := nearest([*seen[end - length + 1 :], token], end - length + 1))
        ]
        lambda_, delta = max(found, default=(0, 0))
        if lambda_ == 0:
            bits.append(math.log2(vocabulary))
        elif lambda_ == l + 1 and l > 1:
            bits.append(math.log2(1 - (d - l + 1) / (l * d)) - 1)
        else:
            bits.append(min(math.log2(delta), math.log2(vocabulary)))
    return bits


class ByDefinition(gptk.LogitsProcessor):
    """The same without a state: from all tokens of the rows, at each step."""

    name = "by-definition"

    strength: float
    window: int
    buffer: int

    def __call__(self, logits, rows):
        size = logits.shape[-1]
        penalties = [
            [
                self.strength * (math.log2(size) - bits)
                for bits in by_definition(
                    rows.tokens[row, :length].tolist(), size, self.window, self.buffer
                )
            ]
            for row, length in enumerate(rows.lengths)
        ]
        return logits - torch.tensor(penalties)


def both(**options):
    return LZPenalty(**options), ByDefinition(**options)


FEW = st.lists(st.integers(0, 3), max_size=10)
TOKENS = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40),
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.builds(lambda loop, times, rest: loop * times + rest + [0], FEW, st.integers(2, 5), FEW),
)
OPTIONS = st.fixed_dictionaries(
    {
        "strength": st.sampled_from([0.15, 1.0]),
        "window": st.sampled_from([1, 2, 5, 17, 512]),
        "buffer": st.sampled_from([1, 2, 3, 32]),
    }
)
PAPER = {"strength": 0.15, "window": 512, "buffer": 32}


@settings(max_examples=300, deadline=None)
@given(tokens=TOKENS, options=OPTIONS)
@example(tokens=[0] * 60, options=PAPER)
@example(tokens=[0] * 60, options=PAPER | {"window": 17})
@example(tokens=[0, 1, 2] * 15, options=PAPER)
@example(tokens=[0, 1, 2, 0, 1, 3, 0, 1], options=PAPER)
@example(tokens=[4], options=PAPER)
def test_it_is_its_definition(tokens, options):
    rows = gptk.Rows([tokens])
    logits = torch.zeros(1, VOCABULARY)
    mine, naive = both(**options)
    torch.testing.assert_close(mine.start(rows)(logits, rows), naive(logits, rows))


def test_the_readme_counts_right():
    # 1 2 3 4 1 2: "1 2" ends the row and stands 4 back; 3 comes next there.
    rows = gptk.Rows([[1, 2, 3, 4, 1, 2]])
    got = LZPenalty(strength=1.0).start(rows)(torch.zeros(1, 16), rows)[0]
    bits = {1: 1.0, 2: 0.0, 3: math.log2(5 / 8) - 1, 4: math.log2(3)}
    want = [bits.get(token, 4.0) - 4 for token in range(16)]
    assert got.tolist() == pytest.approx(want, abs=1e-6)


def test_of_equal_matches_the_nearest_counts():
    # 3 has followed 1 2 both eight and three back.
    assert by_definition([1, 2, 3, 0, 0, 1, 2, 3, 1, 2], 16, 512, 32)[3] == pytest.approx(
        math.log2(1 - (3 - 2 + 1) / (2 * 3)) - 1
    )


@settings(max_examples=100, deadline=None)
@given(
    batch=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=3),
    options=OPTIONS,
    data=st.data(),
)
def test_it_follows_the_rows(batch, options, data):
    rows = gptk.Rows(batch)
    mine, naive = both(**options)
    state = mine.start(rows)
    assert isinstance(state, Matches)
    for move in data.draw(st.lists(st.sampled_from("eeesr"), max_size=10), label="moves"):
        size = len(rows)
        if move == "e":
            n = data.draw(st.integers(1, 4), label="tokens")
            column = st.lists(st.integers(0, 2), min_size=n, max_size=n)
            new = torch.tensor(data.draw(st.lists(column, min_size=size, max_size=size)))
            rows.extend(new)
            state.extend(new)
        elif move == "s":
            parents = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
            rows.select(parents)
            state.select(parents)
        else:
            counts = [
                data.draw(st.integers(0, length - start), label="rewind")
                for length, start in zip(rows.lengths, rows.prompt_lengths, strict=True)
            ]
            rows.rewind(counts)
            state.rewind(counts)
        logits = torch.zeros(len(rows), 5)
        torch.testing.assert_close(state(logits, rows), naive(logits, rows))


def test_masked_tokens_stay_masked_and_unseen_ones_as_they_are():
    rows = gptk.Rows([[1, 2, 1]])
    logits = torch.tensor([[0.5, -torch.inf, 1.0, -torch.inf]])
    got = LZPenalty().start(rows)(logits, rows)[0].tolist()
    assert got[1] == got[3] == -math.inf
    assert got[0] == 0.5
    assert got[2] < 1.0


@given(tokens=TOKENS)
@settings(max_examples=20, deadline=None)
def test_strength_0_changes_nothing(tokens):
    rows = gptk.Rows([tokens])
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LZPenalty(strength=0).start(rows)(logits, rows), logits)


def test_it_ends_a_loop():
    """A model that says 0 1 2 0 1 2 … with probability 0.9 gets out of it."""
    from gptk.testing import markov_lm

    chances = torch.full((8, 8), 0.1 / 7)
    chances[torch.arange(8), (torch.arange(8) + 1) % 8] = 0.9
    chances[2, 0], chances[2, 3] = 0.9, 0.1 / 7
    lm = markov_lm(chances)
    chosen = {"sampler": "greedy", "max_new_tokens": 30}
    assert set(lm.generate([0], **chosen).tokens) == {0, 1, 2}
    assert len(set(lm.generate([0], processors=[LZPenalty(strength=1)], **chosen).tokens)) > 3


OPTION_SETS = [PAPER, {"strength": 1.0, "window": 12, "buffer": 3}]
SAMPLERS = ["greedy", "multinomial", "beam:width=3", "diverse-beam:width=4,beam_groups=2"]


@pytest.mark.parametrize("options", OPTION_SETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strategies_write_what_they_write_without_its_state(sampler, options):
    batch = [[65, 66, 67, 65, 66], [65, 65, 65]]
    chosen = {"sampler": sampler, "max_new_tokens": 24, "seed": 1}
    mine, naive = both(**options)
    got = LM.generate_batch(batch, processors=[mine], **chosen)
    want = LM.generate_batch(batch, processors=[naive], **chosen)
    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert [one.score for one in got] == pytest.approx([one.score for one in want], abs=1e-4)


@pytest.mark.parametrize("sampler", ["greedy", "multinomial:temperature=0.5"])
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors],
)
@given(prompt=prompts())
def test_a_lookup_draft_changes_no_token(sampler, prompt):
    chosen = {
        "sampler": sampler,
        "processors": [LZPenalty(strength=0.5)],
        "max_new_tokens": 24,
        "seed": 3,
    }
    with_draft = LM.generate(prompt, draft="lookup:ngram=1,tokens=4", **chosen)
    assert with_draft.tokens == LM.generate(prompt, **chosen).tokens


@pytest.mark.parametrize("sampler", ["greedy", "multinomial", "beam:width=3"])
def test_a_regex_holds_beside_it(sampler):
    """What the constraint asks for again and again stays allowed, however repetitive it is."""
    out = LM.generate(
        [65, 66],
        sampler=sampler,
        processors=["regex:pattern=(ab){8}[x-z]", LZPenalty(strength=2.0)],
        max_new_tokens=24,
    )
    assert re.fullmatch("(ab){8}[x-z]", out.text)


def test_a_json_schema_holds_beside_it():
    schema = {"type": "array", "items": {"enum": ["a", "bc"]}, "minItems": 4, "maxItems": 4}
    spec = f"json-schema:schema={json.dumps(json.dumps(schema))}"
    out = LM.generate(
        [65], sampler="greedy", processors=[spec, LZPenalty(strength=2.0)], max_new_tokens=60
    )
    assert len(json.loads(out.text)) == 4


def test_gptk_finds_it_by_its_name():
    found = gptk.plugins.find("processor", "lz-penalty")
    assert found.item is LZPenalty
    assert found.distribution.startswith("gptk-lz-penalty ")
    by_name = LM.generate(
        "abab", sampler="greedy", processors=["lz-penalty:strength=0.4"], max_new_tokens=8
    )
    by_class = LM.generate(
        "abab", sampler="greedy", processors=[LZPenalty(strength=0.4)], max_new_tokens=8
    )
    assert by_name.tokens == by_class.tokens


@pytest.mark.parametrize("spec", ["strength=-1", "window=0", "buffer=0", "alpha=1"])
def test_wrong_options_are_named(spec):
    with pytest.raises(gptk.OptionError, match=rf"lz-penalty.*{spec.partition('=')[0]}"):
        gptk.plugins.create("processor", f"lz-penalty:{spec}", gptk.LogitsProcessor)
