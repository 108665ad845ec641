"""The engine: each run as alone, whatever runs beside it and whatever is taken from it."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import (
    LM,
    STRATEGIES,
    Raises,
    check_as_alone,
    check_equal,
    forget,
    memory_for,
    requests,
    sizes_of_passes,
)

import gptk
from gptk.engine import passes
from gptk.engine.engine import ENGINE, Engine
from gptk.testing import tiny_gpt


@settings(max_examples=30, deadline=None)
@given(st.lists(requests, min_size=1, max_size=8), st.integers(0, 2**16))
def test_any_mixture_of_strategies_gives_what_each_gives_alone(chosen, seed):
    responses = list(LM.generate_many(chosen, seed=seed))
    assert sorted(response.index for response in responses) == list(range(len(chosen)))
    check_as_alone(LM, chosen, responses, seed=seed)


@settings(max_examples=25, deadline=None)
@given(st.lists(requests, min_size=2, max_size=8), st.integers(1, 12), st.integers(0, 2**16))
def test_so_it_does_when_blocks_run_out(chosen, blocks, seed):
    """The budget has room for few blocks: runs lose theirs, and read their texts again."""
    lm = gptk.LanguageModel(tiny_gpt(LM.model.config), LM.tokenizer)
    lm.model.load_state_dict(LM.model.state_dict())
    with memory_for(lm, blocks):
        responses = list(lm.generate_many(chosen, seed=seed))
    check_as_alone(lm, chosen, responses, seed=seed)
    assert ENGINE.passes(lm.model).pool.used == 0


def test_runs_share_passes(monkeypatch):
    sizes = sizes_of_passes(monkeypatch)
    list(LM.generate_many([[1], [2], [3, 4]], max_new_tokens=4, ignore_eos=True, ordered=True))
    LM.generate_batch([[1], [2], [3, 4]], max_new_tokens=4, ignore_eos=True)
    assert sizes[-4:] == [4, 3, 3, 3]


def test_a_text_that_begins_like_an_earlier_one_reads_only_the_rest(monkeypatch):
    lm = gptk.LanguageModel(tiny_gpt(LM.model.config))
    beginning = list(range(200))[: lm.model.config.context_length - 10]
    shared = len(beginning) // 64 * 64
    assert shared
    first = lm.generate(beginning, max_new_tokens=2)
    sizes = sizes_of_passes(monkeypatch, lm)
    second = lm.generate(beginning, max_new_tokens=2)
    assert sizes[0] == len(beginning) - shared
    assert second.tokens == first.tokens


class Nan(gptk.LogitsProcessor):
    name = "nan"

    def __call__(self, logits, rows):
        return logits * float("nan")


class Overwrites(gptk.Sampler):
    name = "overwrites"

    def step(self, logits, rows):
        choice = gptk.Choice.one_each(logits.argmax(dim=-1), logits, rows)
        rows.scores.fill_(1)
        logits.fill_(float("nan"))
        return choice


def test_a_run_that_writes_into_its_logits_changes_nobody_elses():
    """Runs have parts of the memory of a pass."""
    chosen = [
        gptk.Request([number], settings={"sampler": Overwrites()} if number % 2 else {})
        for number in range(6)
    ]
    responses = list(LM.generate_many(chosen, max_new_tokens=8, ignore_eos=True))
    for response in responses:
        prompt = response.request.prompt
        want = LM.generate(prompt, max_new_tokens=8, ignore_eos=True, sampler="greedy")
        check_equal(response.generation, want, prompt)


def stops(tokens):
    raise ValueError("on purpose")


def test_a_run_that_fails_ends_with_its_error_and_the_others_go_on():
    window = LM.model.config.context_length
    chosen = [
        gptk.Request([1, 2]),
        gptk.Request([1, 2], settings={"processors": [Raises(after=3)]}),
        gptk.Request([1, 2], settings={"processors": [Nan()]}),
        gptk.Request([1, 2], settings={"stop": stops}),
        gptk.Request([1] * window),
        gptk.Request([3, 4], settings={"sampler": "beam:3"}),
    ]
    responses = list(LM.generate_many(chosen, max_new_tokens=8, seed=0, ordered=True))
    assert [type(response.error).__name__ for response in responses] == [
        "NoneType", "PluginError", "DecodingError", "ValueError", "PromptError", "NoneType",
    ]  # fmt: skip
    good = [response for response in responses if response.error is None]
    check_as_alone(LM, chosen, good, max_new_tokens=8, seed=0)
    assert ENGINE.passes(LM.model).pool.used == 0


def test_threads_and_cancellations_leave_nothing_behind():
    """8 threads, each with streams that it leaves at random, and calls whose results it checks."""
    failures = []

    def work(number):
        try:
            for round_ in range(4):
                prompt = [number + 1, round_ + 1, 7]
                chosen = STRATEGIES[(number * 4 + round_) % len(STRATEGIES)]
                common = {"max_new_tokens": 6, "seed": number}
                stream = LM.stream(prompt, **chosen, **common)
                for step, _ in enumerate(stream):
                    if step == number % 3:
                        break
                if number % 2:
                    stream.interrupt()
                request = gptk.Request(prompt, settings=chosen)
                responses = LM.generate_many([request] * 3, **common)
                check_as_alone(LM, [request] * 3, [next(responses)], **common)
                responses.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    deadline = time.monotonic() + 5
    while ENGINE.rows_in_use and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ENGINE.rows_in_use == 0
    assert ENGINE.passes(LM.model).pool.used == 0


def test_a_plugin_may_generate_within_a_run():
    class Nested(gptk.LogitsProcessor):
        name = "nested"

        def __call__(self, logits, rows):
            assert LM.generate([1, 2], max_new_tokens=2).tokens == inner
            return logits

    inner = LM.generate([1, 2], max_new_tokens=2).tokens
    results = LM.generate_batch([[3], [4]], processors=[Nested()], max_new_tokens=3)
    want = LM.generate_batch([[3], [4]], max_new_tokens=3)
    assert [result.tokens for result in results] == [result.tokens for result in want]


def test_asyncio():
    async def one(number):
        return await LM.agenerate([number + 1], max_new_tokens=4, sampler="multinomial", seed=1)

    async def pieces():
        return [piece async for piece in LM.astream("ab", max_new_tokens=4, seed=1)]

    async def all_of_them():
        tasks = [asyncio.create_task(one(number)) for number in range(64)]
        for task in tasks[::7]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True), await pieces()

    results, text = asyncio.run(all_of_them())
    for number, result in enumerate(results):
        if number % 7:
            want = LM.generate([number + 1], max_new_tokens=4, sampler="multinomial", seed=1)
            assert result.tokens == want.tokens
        else:
            assert isinstance(result, asyncio.CancelledError)
    assert "".join(text) == LM.generate("ab", max_new_tokens=4, seed=1).text
    assert ENGINE.passes(LM.model).pool.used == 0


GONE = "next(responses); vars(sys.modules['gptk.language_model']).clear()"
"""Python clears modules at its end, at times before it closes the iterators that they made."""


@pytest.mark.parametrize("last", ["next(responses)", "list(responses)", GONE])
def test_a_program_may_end_at_any_time(last):
    """Python ends badly with a thread that is within PyTorch."""
    program = f"""
import sys
from gptk.testing import tiny_lm
lm = tiny_lm()
responses = lm.generate_many([[number] for number in range(200)], max_new_tokens=60)
{last}
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_gradients_and_threads_of_the_caller_are_left_as_they_were():
    threads = torch.get_num_threads()
    LM.generate([1], max_new_tokens=1)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_only_the_engine_keeps_threads_that_compute():
    """Teams of several threads that are more than the processors make each other slow."""
    program = """
import os, time, torch
from gptk.testing import tiny_lm
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
lm = tiny_lm()
before = threads()
torch.randn(300, 300) @ torch.randn(300, 300)
with_team = threads()
assert with_team == before + 1, (before, with_team)
seen = []
lm.generate([1], max_new_tokens=3, stop=lambda text: bool(seen.append(threads())))
assert max(seen) <= with_team + 1, (before, with_team, seen)  # the engine, and a thread for it
for _ in range(100):
    time.sleep(0.05)
    if threads() == before + 1:
        break
assert threads() == before + 1, (before, threads())  # the engine, which has nothing to do
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_long_prompts_are_read_in_several_passes(monkeypatch):
    """Passes that read only the middle of a prompt give no states."""
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3], [2] * 9]
    want = [LM.generate(prompt, max_new_tokens=4).tokens for prompt in prompts]
    monkeypatch.setattr(passes, "TOKENS", 4)
    ENGINE.call(ENGINE.passes(LM.model).pool.forget_unused)
    assert [result.tokens for result in LM.generate_batch(prompts, max_new_tokens=4)] == want


def test_a_strategy_that_needs_all_states_of_a_prompt_reads_it_in_several_passes(monkeypatch):
    """Contrastive search, whose second pass over the prompt is joined with others, too."""
    prompt = list(range(100))
    want = LM.generate(prompt, sampler="contrastive", max_new_tokens=4)
    monkeypatch.setattr(passes, "TOKENS", 16)
    sizes = sizes_of_passes(monkeypatch)
    forget(LM)
    check_equal(LM.generate(prompt, sampler="contrastive", max_new_tokens=4), want, "contrastive")
    assert max(sizes) == 16


def test_an_engine_whose_start_was_interrupted_starts_anew(monkeypatch):
    """Ctrl-C may come before its thread is there."""

    def interrupted(_thread):
        raise KeyboardInterrupt

    engine = Engine()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.call(lambda: 1)
    assert engine.call(lambda: 2) == 2
    engine.stop()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.call(lambda: 1)
    engine.stop()
