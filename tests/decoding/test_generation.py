"""Ends of rows, text as a stream, and the public API."""

import codecs
import dataclasses
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk.decoding.text import TextStream
from gptk.testing import tiny_gpt, tiny_lm
from toys import GPT2_LIKE, LLAMA_LIKE, byte_tokenizer

EOS = 256


class Dictate(gptk.Sampler):
    """Writes given tokens, one after the other."""

    name = "dictate"
    tokens: tuple[int, ...]

    def step(self, logits, rows):
        position = rows.lengths[0] - rows.prompt_lengths[0]
        token = torch.full((len(rows),), self.tokens[min(position, len(self.tokens) - 1)])
        return gptk.Choice.one_each(token, logits, rows)


@pytest.fixture(scope="module")
def lm():
    return gptk.LanguageModel(tiny_gpt(), byte_tokenizer())


def dictate(lm, data, **settings):
    return lm.stream("x", sampler=Dictate(tokens=tuple(data)), **settings)


def test_eos_ends_a_row_and_is_not_part_of_the_result(lm):
    out = lm.generate("x", sampler=Dictate(tokens=(*b"abc", EOS)))
    assert (out.text, out.tokens, out.finish_reason) == ("abc", [*b"abc"], "eos")
    assert len(out.token_logprobs) == 3
    assert out.score < sum(out.token_logprobs)  # the score counts EOS


def test_ignore_eos_goes_on(lm):
    tokens = (*b"a", EOS, *b"bcd")
    out = lm.generate("x", sampler=Dictate(tokens=tokens), ignore_eos=True, max_new_tokens=5)
    assert (out.text, out.finish_reason) == ("a<|endoftext|>bcd", "length")


def test_max_new_tokens_ends_a_row(lm):
    out = lm.generate("x", sampler=Dictate(tokens=tuple(b"abcdef")), max_new_tokens=4)
    assert (out.text, out.finish_reason) == ("abcd", "length")


@pytest.mark.parametrize("sampler", ["greedy", "beam:width=3", "multinomial"])
def test_a_full_window_ends_a_row(sampler):
    lm = gptk.LanguageModel(tiny_gpt(GPT2_LIKE))
    out = lm.generate([1] * 20, sampler=sampler, max_new_tokens=50, seed=0)
    assert (len(out.tokens), out.finish_reason) == (GPT2_LIKE.context_length - 20, "length")
    pair = [[1] * 20, [2] * 5]
    one, other = lm.generate_batch(pair, sampler=sampler, max_new_tokens=50, seed=0)
    assert one.tokens == out.tokens
    assert len(other.tokens) == GPT2_LIKE.context_length - 5


@pytest.mark.parametrize("sampler", ["greedy", "beam:width=3", "multinomial"])
def test_a_sliding_window_goes_on(sampler):
    lm = gptk.LanguageModel(tiny_gpt(GPT2_LIKE))
    out = lm.generate([1] * 20, sampler=sampler, max_new_tokens=50, overflow="slide", seed=0)
    assert (len(out.tokens), out.finish_reason) == (50, "length")
    long = lm.generate([1] * 100, sampler=sampler, max_new_tokens=3, overflow="slide", seed=0)
    assert len(long.tokens) == 3


def test_a_time_limit_ends_a_row(lm):
    out = lm.generate("x", max_new_tokens=80, max_seconds=0, ignore_eos=True)
    assert (len(out.tokens), out.finish_reason) == (1, "time")
    start = time.monotonic()
    out = lm.generate("x", sampler="beam", max_new_tokens=90, max_seconds=0.02)
    assert time.monotonic() - start < 5
    assert out.finish_reason in ("time", "eos")


@pytest.mark.parametrize("stop", ["STOP", ["nothing", "STOP", "OPq"]])
def test_a_stop_string_ends_a_row_and_is_not_shown(lm, stop):
    out = lm.generate("x", sampler=Dictate(tokens=tuple(b"abc STOPq")), stop=stop)
    assert (out.text, out.finish_reason) == ("abc ", "stop")
    assert bytes(out.tokens) == b"abc "


def test_a_stop_string_inside_the_first_token_leaves_nothing(lm):
    out = lm.generate("x", sampler=Dictate(tokens=tuple(b"abc")), stop="a")
    assert (out.text, out.tokens, out.finish_reason) == ("", [], "stop")


def test_stop_strings_end_beams_too(lm):
    plain = lm.generate("x", sampler="beam:width=3", max_new_tokens=20, ignore_eos=True)
    letter = next(token for token in plain.tokens[2:] if token < 128)
    out = lm.generate("x", sampler="beam:width=3", max_new_tokens=20, stop=chr(letter))
    for result in (out, *out.alternatives):
        assert chr(letter) not in result.text


@given(
    text=st.text(max_size=30),
    stops=st.lists(st.text(alphabet="ab\n é", min_size=1, max_size=3), max_size=3),
    cut=st.integers(0, 3),
)
def test_streamed_pieces_join_to_the_text_up_to_the_first_stop_string(text, stops, cut):
    text = "ab" * cut + text
    data = text.encode()
    stream = TextStream(stops)
    pieces = [stream.push(bytes([byte])) for byte in data]
    whole = "".join(pieces) + stream.flush()
    ends = [text.find(stop) for stop in stops if stop in text]
    # Of several stop strings the one that completes first counts.
    assert whole == text[: min(ends)] if len(ends) == 1 else text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    if not ends:
        assert whole == text


@given(st.binary(max_size=30))
def test_a_stream_shows_whole_characters_only(data):
    stream = TextStream([])
    shown = "".join(stream.push(bytes([byte])) for byte in data) + stream.flush()
    assert shown == codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def test_a_stream_shows_text_as_it_comes(lm):
    stream = dictate(lm, "né\nSTO STOP".encode(), stop=["STOP"])
    assert stream.live
    pieces = list(stream)
    assert "".join(pieces) == "né\nSTO " == stream.result.text
    assert pieces[:4] == ["n", "", "é", "\n"]
    assert "STO" not in pieces  # it was held back until it could not be the stop string


def test_a_beam_stream_gives_its_text_at_the_end(lm):
    stream = lm.stream("x", sampler="beam:width=2", max_new_tokens=6)
    assert not stream.live
    *before, last = stream
    assert before == [""] * len(before)
    assert last == stream.result.text


def test_an_interrupted_stream_has_the_best_so_far(lm):
    for sampler in ("greedy", "beam:width=3"):
        stream = lm.stream("x", sampler=sampler, max_new_tokens=50, ignore_eos=True)
        shown = "".join(next(stream) for _ in range(5))
        shown += stream.interrupt()
        assert stream.result.finish_reason == "interrupted"
        assert len(stream.result.tokens) == 5
        assert shown == stream.result.text
    with pytest.raises(gptk.GptkError, match="before the first token"):
        lm.stream("x").interrupt()


def test_a_stream_has_no_result_before_its_end(lm):
    with pytest.raises(gptk.GptkError, match="has not ended"):
        _ = lm.stream("x").result


def test_an_interrupted_stream_gives_no_more(lm):
    stream = dictate(lm, b"abc STOx defgh", stop=["STOP"], max_new_tokens=12)
    shown = "".join(next(stream) for _ in range(7)) + stream.interrupt()
    assert shown == "abc STO" == stream.result.text
    assert list(stream) == []
    assert stream.result.finish_reason == "interrupted"


def test_one_processor_need_not_be_a_list(lm):
    one = lm.generate("x", processors="top-k:k=1", max_new_tokens=4, sampler="multinomial")
    assert one.tokens == lm.generate("x", max_new_tokens=4).tokens


def test_one_prompt_is_not_a_batch(lm):
    with pytest.raises(gptk.PromptError, match="must be a list"):
        lm.generate_batch("abc")


def test_equal_prompts_in_a_call_draw_different_texts(lm):
    one, two = lm.generate_batch(["x", "x"], sampler="multinomial", seed=0)
    assert one.tokens != two.tokens
    assert (one.ordinal, two.ordinal) == (0, 1)
    assert one.tokens == lm.generate("x", sampler="multinomial", seed=0).tokens
    assert two.tokens == lm.generate("x", sampler="multinomial", seed=0, ordinal=1).tokens


def test_without_a_seed_the_result_reports_the_one_it_used(lm):
    out = lm.generate("x", sampler="multinomial")
    again = lm.generate("x", sampler="multinomial", seed=out.seed)
    assert out.tokens == again.tokens


def test_an_empty_prompt_starts_from_the_start_token(lm):
    assert lm.generate("", max_new_tokens=3).tokens == lm.generate([EOS], max_new_tokens=3).tokens
    assert lm.generate_batch([]) == []


def test_a_score_is_the_mean_of_negative_logprobs(lm):
    score = lm.score("Every effort")
    ids = torch.tensor([list(b"Every effort")])
    with torch.inference_mode():
        logits = lm.model.logits(lm.model(ids))
    want = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert score.loss == pytest.approx(want.item(), abs=1e-5)
    assert score.perplexity == pytest.approx(want.exp().item(), rel=1e-5)
    assert len(score.token_logprobs) == len(score.tokens) - 1


def test_the_book_s_perplexity_example():
    """Chapter 5: six target probabilities give a loss of 10.7940 and a perplexity of 48725.8."""
    p = [7.4541e-05, 3.1061e-05, 1.1563e-05, 1.0337e-05, 5.6776e-05, 4.7559e-06]
    score = gptk.Score(tokens=[0] * 7, token_logprobs=torch.tensor(p).log().tolist())
    assert score.loss == pytest.approx(10.7940, abs=1e-4)
    assert score.perplexity == pytest.approx(48725.8, rel=1e-4)


BAD_INPUT = {
    "unknown sampler": ({"sampler": "bean"}, "did you mean beam"),
    "unknown processor": ({"processors": ["tok-k"]}, "did you mean top-k"),
    "unknown option": ({"sampler": "beam:widht=3"}, "did you mean width"),
    "out of bounds": ({"sampler": "beam:width=0"}, "width=0 is not allowed; width is integer ≥ 1"),
    "wrong type": ({"sampler": "top-k:k=many"}, "k=many is not allowed"),
    "not finite": ({"sampler": "top-p:p=nan"}, "p=nan is not allowed"),
    "a bad spec": ({"sampler": "beam width=3"}, "cannot read 'beam width=3'"),
    "max_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
    "n": ({"n": 0}, "n is 0"),
    "overflow": ({"overflow": "wrap"}, "overflow is 'wrap'; it must be stop or slide"),
    "empty stop": ({"stop": ""}, "the stop string '' is not a text"),
    "half a step": ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
    "a text for n": ({"n": "3"}, "n is '3'; it must be a whole number"),
    "a seed with a fraction": ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
    "a stop string no text has": ({"stop": "\ud800"}, "has a character that no model writes"),
    "a text for max_seconds": ({"max_seconds": "1"}, "max_seconds is '1'; it must be a number"),
    "no time at all": ({"max_seconds": float("nan")}, "max_seconds is nan"),
    "beyond reason": ({"sampler": "beam:length_penalty=400"}, "length_penalty is number ≥ -10"),
    "a number for a sampler": ({"sampler": 3}, "a sampler is a spec string or a Sampler"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_settings_are_refused_in_one_line(lm, name):
    settings, message = BAD_INPUT[name]
    with pytest.raises(gptk.GptkError) as caught:
        lm.generate("x", **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_PROMPTS = {
    "too long": (
        "x" * LLAMA_LIKE.context_length,
        "the prompt has 96 tokens and the model",
    ),
    "no tokens": ([], "the prompt has no tokens"),
    "texts": (["a", "b"], "a prompt is a text or a list of token ids"),
    "numbers as text": (["1", "2"], "a prompt is a text or a list of token ids"),
    "fractions": ([1.7], "a prompt is a text or a list of token ids"),
    "nothing": (None, "a prompt is a text or a list of token ids"),
    "a token outside": ([1, 5000], "token 5000 is not in the model's vocabulary of 257"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused_in_one_line(lm, name):
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(gptk.PromptError, match=message):
        lm.generate(prompt)


def test_a_model_without_a_tokenizer_takes_token_ids_only():
    lm = gptk.LanguageModel(tiny_gpt())
    out = lm.generate([1, 2], max_new_tokens=3)
    assert len(out.tokens) == 3
    assert out.text == ""
    with pytest.raises(gptk.TokenizerError, match="--tokenizer"):
        lm.generate("x")
    with pytest.raises(gptk.TokenizerError):
        lm.generate([1], stop="x")


@settings(max_examples=5)
@given(st.integers(1, 3))
def test_bfloat16_generates(width):
    lm = gptk.LanguageModel(tiny_gpt().to(torch.bfloat16))
    out = lm.generate([1, 2], sampler=f"beam:width={width}", max_new_tokens=4)
    assert len(out.tokens) == 4
    assert dataclasses.asdict(out)["finish_reason"] == "length"


def test_stop_conditions_are_asked_after_each_token_and_mix_with_strings():
    asked = []

    def five(tokens):
        asked.append(list(tokens))
        return len(tokens) == 2 + 5

    lm, prompt = tiny_lm(), [65, 66]
    out = lm.generate(prompt, stop=[five, "\n\n"], ignore_eos=True)
    free = lm.generate(prompt, ignore_eos=True)
    assert (out.tokens, out.finish_reason) == (free.tokens[:5], "stop")
    assert asked == [[*prompt, *free.tokens[:n]] for n in range(1, 6)]
    assert lm.generate(prompt, stop=five, ignore_eos=True).tokens == out.tokens
    beams = lm.generate(prompt, stop=five, sampler="beam:width=3", n=3, ignore_eos=True)
    assert [len(result.tokens) for result in (beams, *beams.alternatives)] == [5, 5, 5]
    with pytest.raises(gptk.OptionError, match="stop string 3"):
        lm.generate(prompt, stop=[3])
