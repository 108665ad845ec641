"""Streams: `with`, interrupts from other threads, tokens with the pieces; and many threads."""

import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_generation import Dictate

import gptk
from gptk.model.blocks import BlockCache
from gptk.testing import tiny_gpt, tiny_lm

LM = tiny_lm()
LONG = {"max_new_tokens": 90, "ignore_eos": True}


def follows(tokens, out):
    """Whether tokens, as a stream gave them, are those of a result."""
    assert [token.token for token in tokens] == out.tokens
    assert [token.logprob for token in tokens] == out.token_logprobs
    assert [token.text for token in tokens] == out.token_texts
    assert "".join(token.text for token in tokens) == out.text
    return True


# --- `with` -----------------------------------------------------------------------------------


def test_leaving_the_block_ends_the_stream_and_frees_its_cache():
    with LM.stream("abc", **LONG) as stream:
        shown = next(stream) + next(stream)
        cache = weakref.ref(stream._decoding.session._cache)
    gc.collect()
    assert cache() is None
    assert list(stream) == []
    assert (stream.result.finish_reason, len(stream.result.tokens)) == ("interrupted", 2)
    assert stream.result.text.startswith(shown)


def test_a_stream_read_to_its_end_keeps_no_cache():
    stream = LM.stream("abc", max_new_tokens=3)
    first = next(stream)
    cache = weakref.ref(stream._decoding.session._cache)
    assert first + "".join(stream) == stream.result.text
    gc.collect()
    assert cache() is None


def test_a_block_that_read_nothing_has_no_result():
    with LM.stream("abc") as stream:
        pass
    assert list(stream) == []
    with pytest.raises(gptk.GptkError, match="ended before its first token, and has no result"):
        _ = stream.result


def test_an_error_in_the_block_is_the_callers():
    stream = LM.stream("abc")

    def fail():
        with stream:
            next(stream)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.result.finish_reason == "interrupted"


# --- Interrupts -------------------------------------------------------------------------------


class Slow(gptk.LogitsProcessor):
    """Takes 5 ms."""

    name = "slow"

    def __call__(self, logits, rows):
        time.sleep(0.005)
        return logits


@pytest.mark.parametrize("sampler", ["greedy", "beam:width=3"])
def test_another_thread_interrupts(sampler):
    stream = LM.stream("abc", sampler=sampler, processors=[Slow()], stop="zzzz", **LONG)
    began, pieces = threading.Event(), []

    def read():
        for piece in stream:
            pieces.append(piece)
            began.set()

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert began.wait(20)
        rest = stream.interrupt()
        reading.result(timeout=20)
    assert stream.result.finish_reason == "interrupted"
    assert 0 < len(stream.result.tokens) < 90
    # Whoever came first after the last step has the rest.
    assert stream.result.text in ("".join(pieces) + rest, rest)


def test_an_interrupt_between_steps_ends_the_reading_of_another_thread():
    stream = LM.stream("abc", **LONG)
    first = next(stream)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(stream.interrupt).result(timeout=20)
    assert list(stream) == []
    assert stream.result.text == first + rest


def test_an_interrupt_before_the_first_step():
    stream = LM.stream("abc")
    with pytest.raises(gptk.DecodingError, match="before the first token"):
        stream.interrupt()
    assert list(stream) == []


def test_a_second_interrupt_gives_nothing_more():
    stream = LM.stream("abc", **LONG)
    next(stream)
    stream.interrupt()
    assert stream.interrupt() == ""


def test_what_a_step_calls_may_interrupt_it_and_may_not_read_it():
    read = []

    def condition(tokens):
        if len(tokens) == 6:
            assert stream.interrupt() == ""
            with pytest.raises(gptk.GptkError, match="cannot be read by what its own steps call"):
                next(stream)
            read.append(True)
        return False

    stream = LM.stream("abc", stop=condition, **LONG)
    text = "".join(stream)
    assert read
    assert (stream.result.finish_reason, len(stream.result.tokens)) == ("interrupted", 3)
    assert text == stream.result.text


def test_threads_that_interrupt_at_random_times_leave_a_result():
    choose = random.Random(0)
    for _ in range(8):
        stream = LM.stream("abc", sampler="multinomial", **LONG)
        with ThreadPoolExecutor(3) as pool:
            reading = [pool.submit(lambda s=stream: "".join(s)) for _ in range(2)]
            time.sleep(choose.random() * 0.05)
            try:
                rest = pool.submit(stream.interrupt).result(timeout=20)
            except gptk.DecodingError:  # it had not begun
                continue
        shown = sum(len(pieces.result(timeout=20)) for pieces in reading)
        assert shown + len(rest) == len(stream.result.text)


# --- Tokens -----------------------------------------------------------------------------------


@given(
    data=st.text(alphabet="aéSTO P漢", max_size=12).map(str.encode),
    stop=st.lists(st.sampled_from(["STOP", "TO", "é", "Sa", "漢"]), max_size=2),
    cut=st.integers(0, 3),
)
def test_tokens_are_those_of_the_result(data, stop, cut):
    """Tokens of bytes, so that characters and stop strings are cut anywhere."""
    data = data[: len(data) - cut] + b"."
    settings = {"sampler": Dictate(tokens=tuple(data)), "stop": stop, "max_new_tokens": len(data)}
    with LM.stream("x", **settings) as stream:
        tokens = list(stream.tokens())
    assert follows(tokens, stream.result)
    assert tokens == list(LM.stream("x", **settings).tokens())


def test_tokens_come_with_the_step_that_makes_them_certain():
    stream = LM.stream("x", sampler=Dictate(tokens=tuple("aéST STOP".encode())), stop="STOP")
    counts, given = [], stream.tokens()
    steps = 0
    for token in given:
        steps = stream._decoding.steps if stream._decoding is not None else steps
        counts.append((token.text, steps))
    # A token of `é` and those of `ST` wait for what comes after them.
    assert counts == [("a", 1), ("", 3), ("é", 3), ("S", 6), ("T", 6), (" ", 6)]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "beam:width=3", "n": 2},
        {"sampler": "multinomial", "n": 3},
        {"sampler": "multinomial", "draft": "lookup:ngram=1,tokens=3"},
        {"top_logprobs": 2},
    ],
)
def test_tokens_of_any_stream(settings):
    stream = LM.stream("abab", seed=0, max_new_tokens=10, **settings)
    tokens = list(stream.tokens())
    assert follows(tokens, stream.result)
    tops = [token.top_logprobs for token in tokens]
    assert tops == (stream.result.top_logprobs or [None] * len(tokens))


def test_an_interrupted_stream_has_given_its_tokens():
    stream = LM.stream("abc", **LONG)
    given = stream.tokens()
    tokens = [next(given) for _ in range(3)]
    stream.interrupt()
    assert follows([*tokens, *given], stream.result)


def test_tokens_without_a_tokenizer_have_no_text():
    stream = gptk.LanguageModel(tiny_gpt()).stream([1, 2], max_new_tokens=4)
    assert follows(list(stream.tokens()), stream.result)


# --- Memory -----------------------------------------------------------------------------------


def test_a_lack_of_memory_is_one_line(monkeypatch):
    """With the error that PyTorch raises on a CPU."""
    asked = (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
    )
    prepare = BlockCache.prepare

    def scarce(self, row, count, **how):
        if max(self.lengths) > 6:
            raise RuntimeError(asked)
        return prepare(self, row, count, **how)

    monkeypatch.setattr(BlockCache, "prepare", scarce)
    stream = LM.stream("abc", sampler="multinomial", n=3, ignore_eos=True)
    with pytest.raises(gptk.OutOfMemory) as caught:
        list(stream)
    assert str(caught.value) == (
        "decoding a prompt with 3 rows needs more memory than there is: the last piece takes "
        "99 bytes; ask for fewer results or beams, or for fewer new tokens"
    )
    stream.interrupt()
    assert len(stream.result.tokens) > 2


# --- Threads ----------------------------------------------------------------------------------

JOBS = [
    {"sampler": sampler, "processors": processors, "draft": draft, "seed": seed}
    for seed in range(2)
    for sampler in ("greedy", "multinomial", "beam:width=3", "contrastive:k=2", "mirostat")
    for processors in ([], ["dry:multiplier=0.8", "cfg:scale=1.5"], ['regex:pattern="[a-f]{3,}"'])
    for draft in ([None, "lookup"] if sampler in ("greedy", "multinomial") else [None])
]


def work(lm, job):
    out = lm.generate(f"one two {job['seed']}", max_new_tokens=12, top_logprobs=1, **job)
    return [(result.tokens, result.finish_reason) for result in (out, *out.alternatives)]


def test_threads_that_share_a_model_get_what_each_would_get_alone():
    lm = tiny_lm()  # a fresh one, whose caches are empty
    together = [None] * len(JOBS)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: work(lm, job), JOBS))
    assert together == [work(LM, job) for job in JOBS]


def test_two_streams_in_turns_give_what_each_gives_alone():
    for model in (LM, LM_TRAINING):
        streams = [model.stream(prompt, **LONG) for prompt in ("abc", "xyz" * 4)]
        texts = ["", ""]
        for _ in range(92):
            for index, stream in enumerate(streams):
                texts[index] += next(stream, "")
        assert texts == [LM.generate(prompt, **LONG).text for prompt in ("abc", "xyz" * 4)]


LM_TRAINING = tiny_lm()
LM_TRAINING.model.set_dropout(0.5)
LM_TRAINING.model.train()


def test_threads_that_share_a_model_in_training_mode_use_no_dropout():
    """A call that ends must not switch dropout on under another that goes on."""
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: LM_TRAINING.generate("abc", **LONG).tokens, range(12)))
    assert all(tokens == LM.generate("abc", **LONG).tokens for tokens in texts)
    assert LM_TRAINING.model.training


def test_scores_and_evaluations_of_a_model_in_training_mode_use_no_dropout():
    from gptk.engine.scoring import score_continuations

    assert LM_TRAINING.score("some text") == LM.score("some text")
    pairs = [([1, 2], [3, 4, 5])]
    scores = [list(score_continuations(lm.model, pairs)) for lm in (LM_TRAINING, LM)]
    assert scores[0] == scores[1]
    assert gptk.evaluate(LM_TRAINING, list(b"some text")) == gptk.evaluate(LM, list(b"some text"))
    assert LM_TRAINING.model.training
    assert torch.is_grad_enabled()
