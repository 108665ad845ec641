"""Processors that ban, bias or force tokens, against transformers, and texts as their options."""

import itertools
import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_penalties import EOS, apply, batches, logits, make

import gptk
from gptk.plugins.creating import create
from gptk.testing import tiny_lm
from toys import byte_tokenizer

SEQUENCES = st.lists(
    st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple
)
GPT2 = gptk.load_tokenizer("gpt2")


def same(got, want):
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def by_row(theirs, scores, prompts, news):
    """What a processor of transformers, made for the row's prompt length, gives for each row."""
    return torch.cat(
        [
            theirs(len(prompt))(torch.tensor([prompt + new]), scores[row : row + 1].clone())
            for row, (prompt, new) in enumerate(zip(prompts, news, strict=True))
        ]
    )


def real(rows=3):
    """49,152 logits by Zipf's law, and token ids that repeat parts of themselves."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.empty(rows, 49_152)
    prompts = []
    for row in range(rows):
        ranks = torch.randperm(49_152, generator=generator) + 1
        scores[row] = 12 - 1.3 * ranks.log()
        ids = (torch.rand(150 + 90 * row, generator=generator) ** 3 * 49_152).long().tolist()
        prompts.append(ids + ids[20:60] + ids[5:45] + ids[22:40])
    return scores, prompts


@settings(max_examples=60)
@given(scores=logits(), batch=batches(), size=st.integers(1, 5))
def test_no_repeat_ngram_is_transformers(scores, batch, size):
    want = by_row(lambda start: transformers.NoRepeatNGramLogitsProcessor(size), scores, *batch)
    same(apply(f"no-repeat-ngram:size={size}", scores, *batch), want)


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_no_repeat_ngram_is_transformers_on_long_rows(size):
    scores, prompts = real()
    news = [[]] * 3
    want = by_row(
        lambda start: transformers.NoRepeatNGramLogitsProcessor(size), scores, prompts, news
    )
    assert (want == -torch.inf).any(dim=1).all()
    same(apply(f"no-repeat-ngram:size={size}", scores, prompts), want)


@settings(max_examples=40)
@given(
    scores=logits(),
    batch=batches(),
    n=st.integers(0, 6),
    eos=st.lists(st.integers(0, 15), min_size=1, max_size=3, unique=True),
)
def test_min_new_tokens_is_transformers(scores, batch, n, eos):
    def theirs(start):
        return transformers.MinNewTokensLengthLogitsProcessor(start, n, eos)

    want = by_row(theirs, scores, *batch)
    same(apply(f"min-new-tokens:n={n}", scores, *batch, eos=eos), want)


@settings(max_examples=40)
@given(scores=logits(), batch=batches(), tokens=st.sets(st.integers(0, 15)), begin=st.booleans())
def test_suppress_tokens_is_transformers(scores, batch, tokens, begin):
    def theirs(start):
        if begin:
            return transformers.SuppressTokensAtBeginLogitsProcessor(tokens, start)
        return transformers.SuppressTokensLogitsProcessor(tokens)

    spec = f"suppress-tokens:tokens={list(tokens)},begin={str(begin).lower()}"
    same(apply(spec, scores, *batch), by_row(theirs, scores, *batch))


@settings(max_examples=60)
@given(scores=logits(), batch=batches(), words=SEQUENCES, eos=st.sampled_from([(), (7,), (3, 5)]))
def test_bad_words_is_transformers(scores, batch, words, eos):
    if all(tuple(word) in {(token,) for token in eos} for word in words):
        return  # transformers refuses an empty list
    want = by_row(
        lambda start: transformers.NoBadWordsLogitsProcessor(words, list(eos)), scores, *batch
    )
    same(apply(f"bad-words:words={words}", scores, *batch, eos=eos), want)


@settings(max_examples=60)
@given(scores=logits(), batch=batches(), data=st.data())
def test_sequence_bias_is_transformers(scores, batch, data):
    biases = [
        [sequence, data.draw(st.floats(-50, 50, width=32))] for sequence in data.draw(SEQUENCES)
    ]
    want = by_row(lambda start: transformers.SequenceBiasLogitsProcessor(biases), scores, *batch)
    same(apply(f"sequence-bias:biases={json.dumps(biases)}", scores, *batch), want)


def test_sequences_are_transformers_on_long_rows():
    scores, prompts = real()
    sequences = [[*prompt[-k:], 11 * k + 5] for prompt in prompts for k in range(6)]
    sequences += [[k, k + 1, k + 2] for k in range(300)]
    biases = [[sequence, 0.5 + i] for i, sequence in enumerate(sequences)]
    news = [[]] * 3
    want = by_row(
        lambda start: transformers.SequenceBiasLogitsProcessor(biases), scores, prompts, news
    )
    assert (want != scores).sum(dim=1).tolist() == [6, 6, 6]
    same(apply(f"sequence-bias:biases={biases}", scores, prompts), want)
    want = by_row(
        lambda start: transformers.NoBadWordsLogitsProcessor(sequences, 0), scores, prompts, news
    )
    same(apply(f"bad-words:words={sequences}", scores, prompts), want)


@settings(max_examples=40)
@given(scores=logits(), token=st.integers(0, 15))
def test_a_forced_first_token_is_transformers_forced_bos(scores, token):
    theirs = transformers.ForcedBOSTokenLogitsProcessor(token)
    prompts = [[1], [2], [3]]
    for news in ([[], [], []], [[4], [5], []]):
        want = by_row(lambda start: theirs, scores, prompts, news)
        want[scores == -torch.inf] = -torch.inf  # transformers unmasks masked tokens
        same(apply(f"forced-tokens:tokens={[token]}", scores, prompts, news), want)


@settings(max_examples=40)
@given(
    scores=logits(),
    batch=batches(),
    place=st.integers(0, 6),
    eos=st.lists(st.integers(0, 15), min_size=1, max_size=3, unique=True),
)
def test_a_forced_end_is_transformers_forced_eos(scores, batch, place, eos):
    def theirs(start):
        return transformers.ForcedEOSTokenLogitsProcessor(start + place + 1, eos)

    want = by_row(theirs, scores, *batch)
    want[scores == -torch.inf] = -torch.inf
    same(apply(f"forced-tokens:eos_at={place}", scores, *batch, eos=eos), want)


@settings(max_examples=40)
@given(scores=logits(), bias=st.dictionaries(st.integers(0, 15), st.floats(-100, 100, width=32)))
def test_logit_bias_is_added(scores, bias):
    want = scores.clone()
    for token, added in bias.items():
        want[:, token] += added
    spec = f"logit-bias:bias={json.dumps(bias)}"  # whose keys are texts of digits
    assert torch.equal(apply(spec, scores, [[1]] * 3), want)
    if bias:
        same(
            apply(f"sequence-bias:biases={[[[t], b] for t, b in bias.items()]}", scores, [[1]] * 3),
            transformers.SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])(
                torch.tensor([[1]] * 3), scores
            ),
        )


# In generation

LM = tiny_lm()


def test_forced_text_stands_where_it_is_due():
    text = LM.generate(
        "x", processors=['forced-tokens:text="ab, c",at=3'], max_new_tokens=12
    ).tokens
    free = LM.generate("x", max_new_tokens=3).tokens
    assert text[:8] == [*free, *b"ab, c"]
    assert len(text) == 12


@pytest.mark.parametrize("sampler", ["greedy", "beam:width=3", "multinomial"])
def test_rows_end_where_they_must_and_not_before(sampler):
    force = ["min-new-tokens:n=9", "forced-tokens:eos_at=9"]
    for out in LM.generate_batch([[1], [2, 3]], sampler=sampler, processors=force, seed=1):
        assert (len(out.tokens), out.finish_reason) == (9, "eos")


def test_no_ngram_comes_twice_in_generated_text():
    for sampler in ("greedy", "beam:width=4"):
        out = LM.generate(
            [5, 6, 5], sampler=sampler, processors=["no-repeat-ngram:size=2"], max_new_tokens=60
        )
        row = [5, 6, 5, *out.tokens]
        pairs = list(itertools.pairwise(row))
        assert len(set(pairs)) == len(pairs) > 10


def test_biased_and_banned_texts_in_generation():
    drawn = {"sampler": "multinomial:temperature=3", "max_new_tokens": 60, "ignore_eos": True}
    loved = LM.generate("x", processors=['logit-bias:bias={"e": 60}'], **drawn)
    assert loved.text == "e" * 60
    spec = 'bad-words:words=["e"]'
    assert "e" not in LM.generate("x", processors=[spec], seed=1, **drawn).text
    pair = LM.generate("x", processors=['sequence-bias:biases={"xe": 80, "ex": 80}'], **drawn)
    assert pair.text == "ex" * 30


# Texts as options


def rows_of(tokenizer, prompt=(1,)):
    return gptk.Rows([list(prompt)], eos=(), tokenizer=tokenizer)


def changed(spec, tokenizer, prompt=(1,), size=50_257):
    """The change that a processor makes to each token it changes."""
    rows = rows_of(tokenizer, prompt)
    got = make(spec).start(rows)(torch.zeros(1, size), rows)[0]
    return {token: got[token].item() for token in got.nonzero()[:, 0].tolist()}


def test_texts_are_the_models_tokens():
    the, cat = GPT2.encode(" the")[0], GPT2.encode(" cat")[0]
    assert changed('suppress-tokens:tokens=[" the", 5]', GPT2) == {the: -torch.inf, 5: -torch.inf}
    bias = 'logit-bias:bias={" the": 2.5, "11": -100}'
    assert changed(bias, GPT2) == {the: 2.5, 11: -100}
    assert changed('logit-bias:bias=[["11", -100]]', GPT2) == {GPT2.encode("11")[0]: -100}
    spec = 'sequence-bias:biases={" the cat": 1.5}'
    assert changed(spec, GPT2) == {}
    assert changed(spec, GPT2, [1, the]) == {cat: 1.5}


def test_a_bad_word_is_banned_with_and_without_a_space_before_it():
    plain, spaced = GPT2.encode("cat")[0], GPT2.encode(" cat")[0]
    assert set(changed('bad-words:words=["cat"]', GPT2)) == {plain, spaced}
    assert set(changed('bad-words:words=[" cat"]', GPT2)) == {spaced}
    line = GPT2.encode("\n")[0]
    assert set(changed(r'bad-words:words=["\n"]', GPT2)) == {line}
    *before, last = GPT2.encode(" supercalifragilistic")
    assert set(changed('bad-words:words=["supercalifragilistic"]', GPT2, before)) == {last}


def test_a_text_gets_no_bos():
    tokenizer = gptk.Tokenizer(GPT2.encoding, bos=50_256, add_bos=True)
    assert tokenizer.encode(" cat")[0] == 50_256
    assert set(changed('bad-words:words=[" cat"]', tokenizer)) == set(GPT2.encode(" cat"))
    assert set(changed('bad-words:words=["<|endoftext|>"]', tokenizer)) == {50_256}


@pytest.mark.parametrize(
    "spec",
    [
        'bad-words:words=\'["foo, bar", "baz"]\'',
        'bad-words:words=["foo, bar", "baz"]',
        r'bad-words:words="[\"foo, bar\", \"baz\"]"',
        'bad-words:words=[ "foo, bar",\n"baz"]',
    ],
)
def test_lists_are_written_with_and_without_quotes(spec):
    assert make(spec).words == ("foo, bar", "baz")


@pytest.mark.parametrize(
    "spec",
    [r'bad-words:words=["a\nb"]', r"bad-words:words='[\"a\\nb\"]'", "bad-words:words='[\"a\nb\"]'"],
)
def test_line_breaks_are_written_as_in_json(spec):
    assert make(spec).words == ("a\nb",)


def test_options_in_python_are_lists_and_mappings():
    def of(name, **options):
        return type(make(name))(**options)

    assert of("suppress-tokens:tokens=[]", tokens=[1, "a"]) == make(
        'suppress-tokens:tokens=[1, "a"]'
    )
    bias = of("logit-bias:bias={}", bias={5: 1.5, "a": 2})
    assert bias == make('logit-bias:bias={"5": 1.5, "a": 2}')
    biases = of("sequence-bias:biases={}", biases={(1, 2): 3.0, "a": 1})
    assert biases == make('sequence-bias:biases=[[[1, 2], 3.0], ["a", 1]]')


# Mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("suppress-tokens:tokens=5", "tokens='5' is not allowed; tokens is a JSON list such as"),
        ("suppress-tokens:tokens=[-1]", "tokens=[-1] is not allowed"),
        ('suppress-tokens:tokens=[""]', "tokens=[''] is not allowed"),
        ("suppress-tokens:tokens=[true]", "tokens=[True] is not allowed"),
        ("bad-words:words=foo", "words='foo' is not allowed; words is a JSON list of texts"),
        ("bad-words:words=[[]]", "words=[[]] is not allowed"),
        ("logit-bias:bias=[1]", "bias=[1] is not allowed; bias is a JSON object such as"),
        ('logit-bias:bias={"a": NaN}', "is not allowed"),
        ("sequence-bias:biases=[[[1], null]]", "is not allowed; biases is a JSON object such as"),
        ("dry:sequence_breakers=:", "sequence_breakers=':' is not allowed"),
        ("no-repeat-ngram:size=0", "size=0 is not allowed; size is integer ≥ 1"),
        ("forced-tokens", "needs text, tokens or eos_at"),
        ("forced-tokens:text=a,tokens=[1]", "takes text or tokens, not both"),
        ("forced-tokens:eos_at=3,at=2", "at=2 says where text or tokens begin"),
        ("min-new-tokens", "needs the option n (integer ≥ 0)"),
        ("min-new-tokens:n=-1", "n=-1 is not allowed; n is integer ≥ 0"),
        ("watermark:greenlist_ratio=1", "greenlist_ratio=1 is not allowed"),
        ("watermark:seeding_scheme=x", "seeding_scheme is lefthash or selfhash"),
    ],
)
def test_wrong_options_say_what_is_allowed(spec, message):
    with pytest.raises(gptk.OptionError) as caught:
        make(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "default required" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("suppress-tokens:tokens=[257]", "token 257 is not in the model's vocabulary of 257"),
        ("bad-words:words=[[1, 257]]", "token 257 is not in"),
        ('logit-bias:bias={"999": 1}', "token 999 is not in"),
        ("sequence-bias:biases=[[[999, 1], 1]]", "token 999 is not in"),
        ("forced-tokens:tokens=[257]", "token 257 is not in"),
        ("dry:sequence_breakers=[300]", "token 300 is not in"),
        ('suppress-tokens:tokens=["ab"]', "'ab' is 2 tokens ([97, 98]); bad-words takes several"),
        ('logit-bias:bias={"ab": 1}', "'ab' is 2 tokens ([97, 98]); sequence-bias takes several"),
        ("forced-tokens:tokens=[1, 2],at=3,eos_at=4", "eos_at=4 is within the forced tokens"),
    ],
)
def test_options_that_the_model_does_not_fit_are_told(spec, message):
    with pytest.raises(gptk.OptionError) as caught:
        LM.generate("x", processors=[spec], max_new_tokens=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_forcing_an_end_that_is_to_be_ignored_is_an_error():
    with pytest.raises(gptk.OptionError, match="eos_at=3 needs an end-of-text token"):
        LM.generate("x", processors=["forced-tokens:eos_at=3"], max_new_tokens=5, ignore_eos=True)


@pytest.mark.parametrize(
    "spec",
    [
        'suppress-tokens:tokens=["a"]',
        'bad-words:words=["a"]',
        'logit-bias:bias={"a": 1}',
        'sequence-bias:biases={"a": 1}',
        "forced-tokens:text=a",
        "dry",
    ],
)
def test_a_text_without_a_tokenizer_is_an_error(spec):
    with pytest.raises(gptk.TokenizerError, match=r"--tokenizer gpt2") as caught:
        make(spec).start(rows_of(None))
    assert "\n" not in str(caught.value)


def test_eos_that_the_model_lacks_is_passed_over():
    scores = torch.zeros(1, 5)
    for spec in ("min-new-tokens:n=3", "length-decay:after=0,factor=2"):
        assert torch.equal(apply(spec, scores, [[1]], [[2]], eos=[EOS]), scores)


def test_every_processor_here_takes_an_instance_as_well():
    processor = create("processor", "no-repeat-ngram:size=2", gptk.LogitsProcessor)
    a = LM.generate("x", processors=[processor], max_new_tokens=20)
    assert (
        a.tokens
        == LM.generate("x", processors=["no-repeat-ngram:size=2"], max_new_tokens=20).tokens
    )
    assert byte_tokenizer().decode(a.tokens).startswith(a.text)
