"""The budget of memory that all models share, who waits for it, and that nobody keeps it."""

import asyncio
import functools
import gc
import random
import threading
import weakref

import pytest
import torch
from mixtures import (
    LM,
    MORE_STRATEGIES,
    OTHER,
    Raises,
    block_bytes,
    check_as_alone,
    check_equal,
    forget,
    memory_for,
)

import gptk
from gptk.engine import memory
from gptk.engine.engine import ENGINE
from gptk.engine.passes import Passes
from gptk.engine.run import Run
from gptk.model import pool as pools
from gptk.model.blocks import BlockCache
from gptk.model.pool import BlockPool
from gptk.system.memory import new_zeros
from gptk.testing import tiny_lm

BUDGET = ENGINE.memory.budget(torch.device("cpu"))


def in_engine(function):
    return ENGINE.call(function)


def pool(lm):
    return ENGINE.passes(lm.model).pool


def used(lm):
    return in_engine(lambda: pool(lm).used)


@pytest.fixture(autouse=True)
def _clean():
    forget(LM, OTHER)
    yield
    gptk.set_kv_memory(None)


def test_models_share_the_budget(monkeypatch):
    """With both at work, all together stay within it, and each text is as alone."""
    most = []
    grow = BlockPool._grow
    monkeypatch.setattr(BlockPool, "_grow", lambda self: (grow(self), most.append(BUDGET.taken)))
    chosen = [gptk.Request([number] * 100, settings={"max_new_tokens": 8}) for number in range(8)]
    with memory_for(LM, 30):
        limit = BUDGET.limit
        responses = {LM: LM.generate_many(chosen), OTHER: OTHER.generate_many(chosen)}
        lists = {}
        threads = [
            threading.Thread(target=lambda lm=lm: lists.update({lm: list(responses[lm])}))
            for lm in responses
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert limit == 30 * block_bytes(LM)
    assert max(most) <= limit
    for lm, got in lists.items():
        assert len(got) == len(chosen)
        check_as_alone(lm, chosen, got)


def test_the_beginnings_used_longest_ago_go_first_of_whatever_model():
    """There is room for four of six texts of 64 tokens, which two models have read in turns."""

    def known(lm, number):
        cache = BlockCache(pool(lm), 1)
        cache.recall([[number] * 65])
        return cache.held == [64]

    lms = [LM, tiny_lm(LM.model.config, seed=5)]
    turns = [(lms[number % 2], number) for number in range(6)]
    with memory_for(LM, 4):
        for lm, number in turns:
            lm.generate([number] * 64, max_new_tokens=1)
        assert in_engine(lambda: [known(*turn) for turn in turns]) == [False] * 2 + [True] * 4
        lms[0].generate([9] * 64, max_new_tokens=1)
        assert in_engine(lambda: [known(*turn) for turn in turns]) == [False] * 3 + [True] * 3


def test_a_model_that_is_dropped_gives_its_memory_back():
    lm = tiny_lm(LM.model.config, seed=3)
    before = BUDGET.taken
    lm.generate([1, 2], max_new_tokens=2)
    assert BUDGET.taken > before
    gone = weakref.ref(lm.model)
    del lm
    gc.collect()
    assert gone() is None
    assert BUDGET.taken == before


def test_a_lower_budget_takes_effect_at_the_next_pass():
    with memory_for(LM, 40):
        for number in range(20):
            LM.generate([number] * 70, max_new_tokens=1)
        assert BUDGET.taken > 10 * block_bytes(LM)
    with memory_for(LM, 5):
        LM.generate([1], max_new_tokens=1)
        assert BUDGET.taken <= 5 * block_bytes(LM)


def test_a_run_that_needs_more_than_all_gets_it_and_gives_it_back():
    want = LM.generate([7] * 140, max_new_tokens=8)
    with memory_for(LM, 1):
        check_equal(LM.generate([7] * 140, max_new_tokens=8), want, "with one block")
        LM.generate([1], max_new_tokens=1)
        assert BUDGET.taken == block_bytes(LM)


def test_a_thousand_short_texts_wait_for_a_small_budget(monkeypatch):
    """Each takes a whole block for its few tokens."""
    most = []
    grow = BlockPool._grow
    monkeypatch.setattr(BlockPool, "_grow", lambda self: (grow(self), most.append(BUDGET.taken)))
    prompts = [[number % 251, number // 251] for number in range(1000)]
    with memory_for(LM, 24):
        responses = list(LM.generate_many(prompts, max_new_tokens=2))
    assert len(responses) == 1000
    assert not any(response.error for response in responses)
    assert max(most) <= 24 * block_bytes(LM)
    assert used(LM) == 0


def test_memory_goes_back_to_the_system():
    size = 64 << 20
    before = resident()
    tensor = new_zeros((size // 4,), torch.float32, torch.device("cpu"))
    assert not tensor[::1024].any()
    tensor += 1
    assert resident() - before > size * 0.9
    del tensor
    assert resident() - before < size * 0.1


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_what_the_system_refuses_is_waited_for(monkeypatch):
    """As with a limit of the process: where no more can be taken, runs wait as they would for the
    budget."""
    taken = []

    def scarce(*args):
        if len(taken) >= 6:
            raise MemoryError
        taken.append(args)
        return new_zeros(*args)

    chosen = [gptk.Request([number] * 100, settings={"max_new_tokens": 8}) for number in range(8)]
    with memory_for(LM, 15), monkeypatch.context() as patch:
        patch.setattr(pools, "new_zeros", scarce)
        patch.setattr(Passes, "has_room", lambda self, rows: True)
        responses = list(LM.generate_many(chosen))
    check_as_alone(LM, chosen, responses)


def test_the_newest_runs_are_set_back_whichever_model_they_use(monkeypatch):
    """Two texts of the larger model come first, then many of the smaller one: only these wait."""
    set_back = []
    real = memory.Memory.set_back

    def watched(self, run, budget):
        found = real(self, run, budget)
        if found is not None and found[1] is not None:
            set_back.append(found[1].number - first)
        return found

    monkeypatch.setattr(memory.Memory, "set_back", watched)
    monkeypatch.setattr(Passes, "has_room", lambda self, rows: True)
    common = {"max_new_tokens": 12, "ignore_eos": True}
    streams = [OTHER.stream([number] * 60, **common) for number in range(2)]
    streams += [LM.stream([number] * 60, **common) for number in range(6)]
    runs = [Run(stream.run, 1) for stream in streams]
    with memory_for(OTHER, 4):
        first = ENGINE._count
        ENGINE.start(runs)
        results = [run.result() for run in runs]
    assert set_back
    assert not {0, 1} & set(set_back)
    for result, stream in zip(results, streams, strict=True):
        lm = OTHER if stream in streams[:2] else LM
        check_equal(result, lm.generate(result.prompt_tokens, **common), result)


def test_a_text_is_not_taken_for_one_that_began_like_a_forgotten_one():
    """A block is found by the text before it, not by the block that once held that."""
    tokens = tuple(range(64))

    def found():
        shared = BlockPool(LM.model.config, torch.device("cpu"), torch.float32, BUDGET)
        shared.per_slab = 1
        first, second = shared.take(), shared.take()
        shared.know(first, None, tokens)
        shared.know(second, first, tokens)
        shared.release([first])
        shared.give_back(first)  # the slab of the first block, while the second is in use
        again = shared.take()
        assert again == first
        shared.know(again, None, tuple(reversed(tokens)))
        return shared.find(again, tokens)

    assert in_engine(found) is None


def test_a_stream_goes_on_in_another_precision_after_its_model_was_converted():
    lm = tiny_lm()
    want = lm.generate([1, 2, 3], max_new_tokens=6).tokens
    stream = lm.stream([1, 2, 3], max_new_tokens=6)
    next(stream)
    lm.model.double()
    assert stream.run().tokens == want
    assert used(lm) == 0


# --- Leaks ------------------------------------------------------------------------------------

FAILING = {"sampler": "multinomial", "draft": OTHER, "processors": [Raises(after=2)]}


@pytest.fixture
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.filterwarnings("ignore::gptk.PluginWarning")
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("chosen", [*MORE_STRATEGIES, FAILING], ids=str)
def test_a_run_gives_all_back_when_it_ends(chosen, monkeypatch):
    """At once, without the garbage collector, and while its result or error is kept."""
    common = {"max_new_tokens": 6, "seed": 0, **chosen}
    kept = []
    run = Run(LM.stream([1, 2, 3], **common).run, 1)
    ENGINE.start([run])
    with pytest.MonkeyPatch.context():
        kept.append(outcome(run))
    assert (used(LM), used(OTHER)) == (0, 0)
    read = Passes.read
    for moment in (1, 2, 4):
        run, beside = Run(LM.stream([1, 2, 3], **common).run, 1), Run(LM.stream([5]).run, 1)
        passes = []

        def reading(self, runs, moment=moment, run=run, passes=passes):
            passes.append(runs)
            if len(passes) == moment:
                run.cancel()
            read(self, runs)

        monkeypatch.setattr(Passes, "read", reading)
        ENGINE.start([run, beside])
        beside.result()
        kept.append(outcome(run))
        assert (used(LM), used(OTHER)) == (0, 0)


def outcome(run):
    try:
        return run.result()
    except BaseException as error:
        return error


def test_streams_that_are_read_slowly_keep_little_of_the_passes_that_they_shared():
    """What a pass has computed for several runs is one piece of memory, of which each has a part.
    Of twelve streams, each of which has shared passes with three others that are gone, few keep
    what these had."""
    slow = []
    for number in range(12):
        streams = [LM.stream([number, i], max_new_tokens=8, ignore_eos=True) for i in range(4)]
        runs = [Run(functools.partial(next, stream), 1) for stream in streams]
        ENGINE.start(runs)
        for run in runs:
            run.result()
        slow.append(streams[0])
    sessions = [stream._decoding.session for stream in slow]
    for kept in ([s._logits for s in sessions], [s._hidden for s in sessions]):
        parts = [part for part in kept if part.untyped_storage().nbytes() > part.nbytes]
        assert 0 < len(parts) <= 4
    for number, stream in enumerate(slow):
        check_equal(stream.run(), LM.generate([number, 0], max_new_tokens=8, ignore_eos=True), "")


@pytest.mark.filterwarnings("ignore::gptk.PluginWarning")
@pytest.mark.parametrize("room", [None, 12])
def test_tasks_that_are_cancelled_at_random_leave_nothing_behind(room, monkeypatch):
    """64 tasks of two models with drafts and beams; with little memory, so that they are set back,
    too. Those that end have what they have alone."""
    if room is not None:
        monkeypatch.setattr(Passes, "has_room", lambda self, rows: True)
        gptk.set_kv_memory(room * block_bytes(LM))
    numbers = random.Random(0)
    chosen = [
        gptk.Request(
            [number] * numbers.randint(1, 140),
            settings={**numbers.choice(MORE_STRATEGIES), "max_new_tokens": 6, "seed": number},
        )
        for number in range(64)
    ]
    lms = [numbers.choice([LM, OTHER]) for _ in chosen]

    async def one(lm, request):
        return await lm.agenerate(request.prompt, **request.settings)

    async def all_of_them():
        tasks = [asyncio.create_task(one(*each)) for each in zip(lms, chosen, strict=True)]
        for task in tasks:
            if numbers.random() < 0.5:
                delay = numbers.random() * 0.5
                asyncio.get_running_loop().call_later(delay, task.cancel)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(all_of_them())
    gptk.set_kv_memory(None)
    in_engine(lambda: None)  # whose turn comes when those cancelled have ended
    assert (used(LM), used(OTHER)) == (0, 0)
    for lm, request, result in list(zip(lms, chosen, results, strict=True))[::4]:
        if not isinstance(result, asyncio.CancelledError):
            alone = lm.generate(request.prompt, **{**request.settings, "observers": []})
            check_equal(result, alone, request)
