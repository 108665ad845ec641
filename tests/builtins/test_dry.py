"""DRY: against llama.cpp's numbers, against its definition, and as a follower of the rows."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gptk
from gptk.plugins.creating import create
from gptk.testing import tiny_lm
from toys import byte_tokenizer

VOCABULARY = 12
BYTES = byte_tokenizer()
GPT2 = gptk.load_tokenizer("gpt2")


def dry(**options):
    return type(create("processor", "dry", gptk.LogitsProcessor))(**options)


def penalties(processor, tokens, tokenizer=None, size=VOCABULARY):
    """The penalty of each token after a row."""
    rows = gptk.Rows([tokens], tokenizer=tokenizer)
    return off(processor.start(rows)(torch.zeros(1, size), rows)[0])


def off(logits):
    return {token: -logits[token].item() for token in logits.nonzero()[:, 0].tolist()}


# llama.cpp's tests/test-sampling.cpp: probabilities, options, and the resulting probabilities.
@pytest.mark.parametrize(
    ("vocabulary", "tokens", "multiplier", "base", "allowed", "breakers", "expected"),
    [
        (4, [0, 1], 1.0, 1.1, 2, [], [0.25, 0.25, 0.25, 0.25]),
        (4, [0, 1, 2, 0, 1], 1.0, 1.1, 2, [], [0.296923, 0.296923, 0.109232, 0.296923]),
        (5, [0, 1, 3, 4, 0, 1], 1.0, 1.1, 2, [[3]], [0.2, 0.2, 0.2, 0.2, 0.2]),
        (5, [0, 1, 2, 0, 1], 2.0, 1.1, 2, [], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818]),
        (5, [0, 1, 2, 3, 4, 0, 1], 1.0, 1.1, 4, [], [0.2, 0.2, 0.2, 0.2, 0.2]),
    ],
)
def test_it_gives_what_llama_cpp_gives(
    vocabulary, tokens, multiplier, base, allowed, breakers, expected
):
    processor = dry(
        multiplier=multiplier,
        base=base,
        allowed_length=allowed,
        penalty_last_n=len(tokens),
        sequence_breakers=breakers,
    )
    rows = gptk.Rows([tokens])
    got = processor.start(rows)(torch.full((1, vocabulary), 1 / vocabulary).log(), rows)
    assert got.softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-6)


def unbroken(tokens, breakers):
    """How many tokens come after the last complete breaker."""
    for after in range(len(tokens)):
        until = tokens[: len(tokens) - after]
        if any(until[-len(breaker) :] == breaker for breaker in breakers):
            return after
    return len(tokens)


def by_definition(tokens, multiplier, base, allowed_length, penalty_last_n, sequence_breakers):
    """By trying every token, each of its positions, and every length of the tokens before it."""
    limit = unbroken(tokens, sequence_breakers)
    if penalty_last_n >= 0:
        tokens = tokens[len(tokens) - min(penalty_last_n, len(tokens)) :]
    result = {}
    for token in set(tokens):
        lengths = [
            length
            for place in range(len(tokens))
            if tokens[place] == token
            for length in range(allowed_length, min(place, limit) + 1)
            if tokens[place - length : place] == tokens[-length:]
        ]
        if lengths and [token] not in sequence_breakers and multiplier:
            result[token] = multiplier * base ** (max(lengths) - allowed_length)
    return result


FEW = st.lists(st.integers(0, 3), min_size=1, max_size=10)
TOKENS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.builds(lambda loop, times, end: loop * times + end, FEW, st.integers(2, 4), FEW),
)
OPTIONS = st.fixed_dictionaries(
    {
        "multiplier": st.sampled_from([0.0, 0.8, 2.0]),
        "base": st.sampled_from([1.0, 1.3, 1.75]),
        "allowed_length": st.integers(1, 4),
        "penalty_last_n": st.integers(-1, 30),
        "sequence_breakers": st.lists(
            st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3
        ),
    }
)
REPEATS = {
    "multiplier": 0.8,
    "base": 1.75,
    "allowed_length": 2,
    "penalty_last_n": -1,
    "sequence_breakers": [],
}


@settings(max_examples=300)
@given(tokens=TOKENS, options=OPTIONS)
@example(tokens=[0] * 30, options=REPEATS)
@example(tokens=[0] * 30, options=REPEATS | {"penalty_last_n": 5})
@example(tokens=[0, 1, 2] * 9, options=REPEATS)
@example(tokens=[0, 1, 2, 3] * 5, options=REPEATS | {"sequence_breakers": [[1, 2], [3, 0, 1]]})
def test_it_is_its_definition(tokens, options):
    want = by_definition(tokens, **options)
    assert penalties(dry(**options), tokens) == pytest.approx(want, rel=1e-5)


@settings(max_examples=60)
@given(
    text=st.text("ab:\n", min_size=1, max_size=30),
    breakers=st.lists(st.text("ab:\n", min_size=1, max_size=3), max_size=3),
)
def test_a_breaker_may_be_a_text(text, breakers):
    options = REPEATS | {"multiplier": 1.0, "allowed_length": 1}
    want = by_definition(
        list(text.encode()), **options | {"sequence_breakers": [list(b.encode()) for b in breakers]}
    )
    got = penalties(
        dry(**options | {"sequence_breakers": breakers}), list(text.encode()), BYTES, 257
    )
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "breakers", "following"),
    [
        ("No, the dog runs. Yes, the dog", [], {" runs"}),
        ("Yes: the dog runs. No: the dog", [":"], {" runs"}),
        ("See the dog: runs. See the dog:", [":"], set()),
        ('a one two," three. a one two', ['"'], set()),  # ," is one token, and a breaker
        ('a one two," three. a one two', [], {',"'}),
        ("a b c END of d. a b c END of", [], {" d"}),
        ("a b c END of d. a b c END of", ["END of"], set()),
        ("a b c END of d. a b c END", ["END of"], {" of"}),
        ("I say it so, I say it", ["y it"], set()),  # in no single token
        ("I say it so, I say it", ["o, I"], {" so"}),
    ],
)
def test_a_text_is_a_breaker_however_it_is_cut(text, breakers, following):
    processor = dry(allowed_length=2, sequence_breakers=breakers)
    got = penalties(processor, GPT2.encode(text), GPT2, 50_257)
    assert {GPT2.decode([token]) for token in got} == following


def test_the_default_breakers_are_llama_cpps():
    assert dry().sequence_breakers == ("\n", ":", '"', "*")


def test_penalties_of_long_repetitions_stay_finite():
    row = [1, 2, 3, 4] * 500
    for base, want in ((1, 0.8), (1.01, 0.8 * 1.01**1994), (1.75, 0.8e38), (1e6, 0.8e38)):
        got = penalties(dry(base=base, sequence_breakers=[]), row)
        assert got == {1: pytest.approx(want, rel=1e-5)}


# As a follower


def moves():
    """Extend by some tokens, select from the rows, or rewind."""
    return st.lists(
        st.one_of(
            st.tuples(st.just("extend"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
            st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
            st.tuples(st.just("rewind"), st.lists(st.integers(0, 4), min_size=4, max_size=4)),
        ),
        max_size=12,
    )


@settings(max_examples=150)
@given(prompts=st.lists(TOKENS, min_size=1, max_size=3), moves=moves())
def test_rows_that_moved_are_as_rows_that_began_so(prompts, moves):
    processor = dry(allowed_length=1, sequence_breakers=[[3], [0, 0, 1]], penalty_last_n=20)
    rows = gptk.Rows(prompts)
    followers = [rows, processor.start(rows)]
    for verb, numbers in moves:
        if verb == "extend":
            shift = torch.arange(len(rows))[:, None]
            argument = (torch.tensor(numbers) + shift) % 4
        elif verb == "select":
            argument = [number % len(rows) for number in numbers]
        else:
            new = zip(rows.lengths, rows.prompt_lengths, strict=True)
            argument = [
                min(numbers[row % 4], length - start) for row, (length, start) in enumerate(new)
            ]
        for follower in followers:
            getattr(follower, verb)(argument)
    got = followers[1](torch.zeros(len(rows), VOCABULARY), rows)
    for row, length in enumerate(rows.lengths):
        fresh = penalties(processor, rows.tokens[row, :length].tolist())
        assert off(got[row]) == pytest.approx(fresh)


class Anew(gptk.LogitsProcessor):
    """DRY that rebuilds its state at every step."""

    name = "anew"

    def __call__(self, logits, rows):
        return LOOSE.start(rows)(logits, rows)


LOOSE = dry(multiplier=1.5, allowed_length=1, sequence_breakers=[10, [3, 4]])
LM = tiny_lm()


@pytest.mark.parametrize(
    ("sampler", "draft"),
    [("beam:width=4", None), ("multinomial", None), ("greedy", "lookup:ngram=1,tokens=4")],
)
def test_strategies_that_move_rows_do_not_confuse_it(sampler, draft):
    def run(processor, **more):
        outs = LM.generate_batch(
            [[1, 2, 1, 2, 1], [5] * 8, [9]],
            sampler=sampler,
            processors=[processor],
            max_new_tokens=24,
            seed=3,
            **more,
        )
        return [out.tokens for out in outs]

    assert run(LOOSE, draft=draft) == run(Anew())


def test_a_loop_is_left():
    prompt = "again and again "
    looping = ['logit-bias:bias={"a": 9, "g": 9, "i": 9, "n": 9, "d": 9, " ": 9}']
    plain = LM.generate(prompt, processors=looping, max_new_tokens=80).tokens
    strict = [*looping, "dry:multiplier=3,sequence_breakers=[]"]
    varied = LM.generate(prompt, processors=strict, max_new_tokens=80).tokens

    def longest_repeat(tokens):
        return max(
            size
            for size in range(60)
            if len({tuple(tokens[i : i + size]) for i in range(81 - size)}) < 81 - size or not size
        )

    assert longest_repeat(varied) < 8
    assert longest_repeat(varied) < longest_repeat(plain)
