"""Passes on a GPU and their CUDA graphs, on a CPU: a reference attends in the place of Triton's
kernel, and a recorder goes on with the tensors of its first run, as a CUDA graph does.

tests/model/test_cuda.py has what needs a GPU.
"""

import contextlib
import dataclasses
import gc
import sys
import types
import weakref
from typing import ClassVar

import pytest
import torch

import blocks_by_address
import gptk
from gptk.engine.engine import ENGINE
from gptk.kernels import BLOCK
from gptk.model import graphs, passes, slow_paths
from gptk.model.captured import weights_of, weights_replaced
from gptk.testing import tiny_gpt
from toys import CONFIGS

CONFIG = CONFIGS["llama-like"]


class Recorder:
    """Records as CUDA does: the operations go on with the memory that weights had at the recording,
    and write their result into memory that all graphs share."""

    sizes: ClassVar = []
    """Of all recordings: how many tokens they are for."""
    results: ClassVar = []

    def __init__(self, device):
        pass

    def __call__(self, run):
        model = run.args[0]
        frozen = [weight.detach() for _, _, weight in weights_of(model())]
        result = run()
        self.sizes.append(len(result))
        self.results.append(result)

        def replay():
            for other in self.results:
                other.fill_(torch.nan)
            with weights_replaced(model(), frozen):
                result.copy_(run())
            return result

        return replay


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Passes as on a GPU. Returns the sizes of what was recorded."""
    monkeypatch.setattr(passes, "can_attend", lambda *sizes: True)
    monkeypatch.setattr(graphs, "CUDARecorder", Recorder)
    monkeypatch.setattr(Recorder, "sizes", [])
    monkeypatch.setattr(Recorder, "results", [])
    monkeypatch.setattr(graphs, "_graphs", weakref.WeakKeyDictionary())
    monkeypatch.setitem(sys.modules, "gptk.kernels.triton_attention", blocks_by_address)
    return Recorder.sizes


@contextlib.contextmanager
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "can_attend", lambda *sizes: False)
        yield


def two_models(context_length, config=CONFIG):
    config = dataclasses.replace(config, context_length=context_length)
    return tiny_gpt(config), tiny_gpt(config)


def same_text(model, plain, prompt=(1, 2, 3), **settings):
    """The oracle is the pass on a CPU."""
    settings = {"max_new_tokens": 12, "ignore_eos": True} | settings
    got = gptk.LanguageModel(model).generate(list(prompt), **settings)
    with on_the_cpu():
        want = gptk.LanguageModel(plain).generate(list(prompt), **settings)
    assert got.tokens == want.tokens
    assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-3)


STRATEGIES = [
    {"sampler": "greedy"},
    {"sampler": "multinomial", "n": 3, "seed": 4},
    {"sampler": "beam:3"},
    {"sampler": "contrastive"},
    {"sampler": "dola:layers=high"},
    {"draft": "lookup:1", "prompt": [1, 2, 3, 1, 2, 3]},
    {"prompt": list(range(1, 80)), "max_new_tokens": 8},
]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("settings", STRATEGIES)
def test_a_recorded_pass_gives_the_text_of_the_plain_one(name, settings, recorded):
    model, plain = two_models(128, CONFIGS[name])
    same_text(model, plain, **settings)
    assert recorded


def test_states_stay_when_the_graph_runs_again(recorded):
    """A replay writes where the last one did, and all graphs share their memory."""
    model = tiny_gpt(CONFIG)

    def run():
        sessions = [gptk.DecodeSession(model, [prompt]) for prompt in ([1, 2, 3], [4, 5])]
        for _ in range(3):
            kept = sessions[0].extend(torch.tensor([7])), sessions[0].hidden
            before = sessions[0].hidden.clone()
            sessions[1].extend(torch.tensor([8]))
            assert torch.equal(kept[1], before)

    ENGINE.call(run)
    assert recorded == [1]


def test_rows_of_different_texts_share_a_graph(recorded):
    model, plain = tiny_gpt(CONFIG), tiny_gpt(CONFIG)
    prompts = [[1 + i, *range(2, 3 + 5 * i)] for i in range(5)]
    settings = {"max_new_tokens": 8, "ignore_eos": True}
    got = gptk.LanguageModel(model).generate_batch(prompts, **settings)
    with on_the_cpu():
        want = gptk.LanguageModel(plain).generate_batch(prompts, **settings)
    assert [each.tokens for each in got] == [each.tokens for each in want]
    assert recorded == [8]  # 5 rows


def test_a_size_is_recorded_when_it_comes_again(recorded):
    model = tiny_gpt(CONFIG)
    lm = gptk.LanguageModel(model)
    lm.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)  # passes of 3 tokens and of 1
    assert recorded == []
    lm.generate([4, 5, 6], max_new_tokens=20, ignore_eos=True)
    assert recorded == [4, 1]


def test_sizes_are_padded_to_few():
    assert [graphs.padded(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 250, 256)] == [
        *(1, 2, 4, 4, 8, 8, 16, 16, 24, 256, 256)
    ]
    assert graphs.padded(257) is None


def load_by_copying(model, other):
    model.load_state_dict(other.state_dict())


def load_by_assigning(model, other):
    model.load_state_dict(other.state_dict(), assign=True)
    model.tie()


def replace_data(model, other):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data = theirs.detach().clone()


def replace_layer(model, other):
    model.blocks[1] = other.blocks[1]


def replace_matrix(model, other):
    model.blocks[0].mlp.up.weight = torch.nn.Parameter(other.blocks[0].mlp.up.weight.detach() * 3)


def hook(model, other):
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * 3)


def hook_before(model, other):
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3, *inputs[1:]))


def replace_forward(model, other):
    model.blocks[0].mlp.forward = lambda x: x * 3


def quantize(model, other):
    model.quantize("int8")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        *(load_by_copying, load_by_assigning, replace_data, replace_layer, replace_matrix),
        *(hook, hook_before, replace_forward, quantize),
    ],
)
def test_graphs_follow_a_model_that_changes(change, packed, recorded):
    model, plain = tiny_gpt(CONFIG), tiny_gpt(CONFIG)
    if packed:
        for module in model.modules():  # as `GPT.pack` does on a GPU
            gptk.model.attributes.find_directly(module)
    for _ in range(2):
        same_text(model, plain)
    before = list(recorded)
    other = tiny_gpt(CONFIG, seed=5)
    change(model, other), change(plain, other)
    same_text(model, plain)
    has_none = change in (hook, hook_before, replace_forward)
    assert (recorded == before) == (has_none or change is load_by_copying)


def test_values_written_into_weights_need_no_new_graph(recorded):
    model, plain = tiny_gpt(CONFIG), tiny_gpt(CONFIG)
    for _ in range(2):
        same_text(model, plain)
    before = list(recorded)
    with torch.no_grad():
        for gpt in (model, plain):
            gpt.blocks[0].mlp.up.weight.mul_(2)
    same_text(model, plain)
    assert recorded == before


def test_graphs_keep_no_model_alive():
    model = tiny_gpt(CONFIG)
    gptk.LanguageModel(model).generate([1, 2, 3], max_new_tokens=5)
    gone = weakref.ref(model)
    assert len(graphs._graphs) == 1
    del model
    gc.collect()
    assert gone() is None
    assert not graphs._graphs


def test_a_text_that_outgrows_the_table_of_positions(monkeypatch, recorded):
    monkeypatch.setattr(graphs, "_POSITIONS", 16)
    model, plain = two_models(600)
    same_text(model, plain, max_new_tokens=2 * BLOCK + 20)
    assert recorded.count(1) > 1


def test_blocks_in_more_slabs_than_there_was_room_for(monkeypatch, recorded):
    monkeypatch.setattr(graphs, "_SLABS", 1)
    monkeypatch.setattr("gptk.model.pool._SLAB_BYTES", 1)  # a block each
    model, plain = two_models(600)
    same_text(model, plain, max_new_tokens=8 * BLOCK)
    assert recorded.count(1) > 1


def test_blocks_whose_memory_was_given_back(recorded):
    model, plain = tiny_gpt(CONFIG), tiny_gpt(CONFIG)
    same_text(model, plain)
    ENGINE.passes(model).pool.forget_unused()
    same_text(model, plain)
    same_text(model, plain, prompt=(3, 2, 1))


def test_a_pass_of_many_tokens_is_none(monkeypatch, recorded):
    monkeypatch.setattr(graphs, "MOST_TOKENS", 4)
    monkeypatch.setattr(passes, "MOST_TOKENS", 4)
    model, plain = tiny_gpt(CONFIG), tiny_gpt(CONFIG)
    for _ in range(2):
        same_text(model, plain, prompt=range(1, 30), max_new_tokens=3)
        same_text(model, plain, sampler="beam:6", max_new_tokens=3)
    assert set(recorded) == {1, 4}


class Stream:
    def wait_stream(self, other):
        pass


def test_the_recorder_follows_the_documentation(monkeypatch):
    """PyTorch's notes on CUDA graphs: run on a side stream first, one pool and one stream for
    graphs that share memory, replays on the current stream."""
    calls, streams = [], []

    @contextlib.contextmanager
    def stream(each):
        streams.append(each)
        yield
        streams.pop()

    @contextlib.contextmanager
    def graph(recording, pool, stream, capture_error_mode):
        calls.append(("graph", pool, stream, capture_error_mode))
        yield

    fake = types.SimpleNamespace(
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: calls.append("replay")),
        Stream=Stream,
        current_stream=Stream,
        device=contextlib.nullcontext,
        graph=graph,
        graph_pool_handle=lambda: "pool",
        stream=stream,
    )
    monkeypatch.undo()
    monkeypatch.setattr(torch, "cuda", fake)
    recorder = graphs.CUDARecorder(torch.device("cpu"))
    states = torch.zeros(1)

    def run():
        calls.append(("run", list(streams)))
        return states

    replay = recorder(run)
    side = recorder._stream
    assert calls == [("run", [side]), ("graph", "pool", side, "thread_local"), ("run", [side])]
    assert replay() is states
    assert calls[-1] == "replay"
    assert not streams


def test_where_triton_does_not_run_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr("gptk.system.notices._told", set())
    monkeypatch.setattr(slow_paths, "why_not_triton", lambda: "there is no C compiler")
    for _ in range(2):
        slow_paths.tell_of_slow_inference(torch.device("cuda"), torch.bfloat16, expanded=False)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "many times slower than it could be: there is no C compiler. " in line
