"""The compiled step: the same results, and one program on disk for all models of a shape."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import gptk
from gptk import kernels
from gptk.cli import cli
from gptk.model import compiled
from gptk.model.captured import weights_of
from gptk.system import compiled_code
from gptk.system.compiled_code import Code
from gptk.testing import tiny_gpt, tiny_lm
from toys import CONFIGS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs a C++ compiler"
)


def counted(monkeypatch):
    """How often the compiled step runs, as a list that grows."""
    calls = []
    run = compiled.CompiledStep.__call__
    monkeypatch.setattr(
        compiled.CompiledStep, "__call__", lambda *arguments: calls.append(1) or run(*arguments)
    )
    return calls


def is_equal_to_the_plain_model(config, monkeypatch, prepare=lambda model: None, close=CLOSE):
    plain, model = tiny_gpt(config), tiny_gpt(config)
    prepare(plain), prepare(model)
    gptk.compile_step(model)
    calls = counted(monkeypatch)
    sessions = [gptk.DecodeSession(gpt, [[1, 2, 3]], capacity=5) for gpt in (plain, model)]
    for token in range(config.context_length - 3):  # past all memory reserved, to a full window
        logits = [session.extend(torch.tensor([token])) for session in sessions]
        torch.testing.assert_close(*logits, **close)
        torch.testing.assert_close(sessions[0].hidden, sessions[1].hidden, **close)
    assert len(calls) == config.context_length - 3
    for session in sessions:
        session.rewind(4)
    torch.testing.assert_close(*[s.extend(torch.tensor([7])) for s in sessions], **close)


@NEEDS_COMPILER
def test_a_compiled_step_gives_the_logits_of_the_plain_one(monkeypatch):
    is_equal_to_the_plain_model(CONFIGS["llama-like"], monkeypatch)


@NEEDS_COMPILER
def test_a_program_is_compiled_once_and_takes_the_weights_of_any_model_of_its_shape():
    announced = []
    config = CONFIGS["llama-like"]
    for seed in (0, 1):
        model = gptk.compile_step(tiny_gpt(config, seed=seed), lambda: announced.append(1))
        plain = gptk.LanguageModel(tiny_gpt(config, seed=seed))
        settings = {"max_new_tokens": 12, "ignore_eos": True}
        want = plain.generate([1, 2], **settings)
        assert gptk.LanguageModel(model).generate([1, 2], **settings).tokens == want.tokens
    assert len(announced) <= 1


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "foreign": lambda path: path.write_bytes(b"PK and no more"),
    "writable by others": lambda path: path.chmod(0o602),
}


@NEEDS_COMPILER
def test_a_program_that_is_damaged_or_not_gptks_is_compiled_again(tmp_path, monkeypatch, caplog):
    """Whoever can write a program runs code in the process that loads it."""
    config, compilations = CONFIGS["llama-like"], []
    gptk.compile_step(tiny_gpt(config))  # in the cache of all tests
    (kept,) = (Path(os.environ["GPTK_CACHE"]) / "code").glob(f"{record_of(config)}-*")

    def compile_again(model, path):
        compilations.append(path)
        shutil.copy(kept, path)

    monkeypatch.setattr(compiled, "_compile", compile_again)
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path))
    for damage in (None, *DAMAGE.values()):
        (copy,) = (tmp_path / "code").glob("*.pt2") if damage else (None,)
        if damage:
            damage(copy)
        compilations.clear()
        for _ in range(2):
            assert gptk.compile_step(tiny_gpt(config)).step is not None
        assert len(compilations) == 1
    assert caplog.text.count("is made again") == len(DAMAGE)


def record_of(config):
    code = Code("step", ".pt2", compiled._origin(tiny_gpt(config)), lambda path: None)
    return compiled_code._record(Path(), code).stem


@NEEDS_COMPILER
def test_several_rows_and_guesses_run_without_it(monkeypatch):
    config = CONFIGS["llama-like"]
    lm = gptk.LanguageModel(gptk.compile_step(tiny_gpt(config)))
    plain = gptk.LanguageModel(tiny_gpt(config))
    calls = counted(monkeypatch)
    for settings in ({"sampler": "beam:width=3"}, {"sampler": "multinomial", "n": 3, "seed": 1}):
        got, want = (m.generate([1, 2, 3], max_new_tokens=8, **settings) for m in (lm, plain))
        assert got.tokens == want.tokens
    assert not calls
    got = lm.generate([1, 2, 3, 1, 2, 3], max_new_tokens=12, draft="lookup", ignore_eos=True)
    want = plain.generate([1, 2, 3, 1, 2, 3], max_new_tokens=12, ignore_eos=True)
    assert got.tokens == want.tokens


@NEEDS_COMPILER
def test_values_written_into_its_weights_are_read():
    model, plain = compiled_and_plain()
    with torch.no_grad():
        for gpt in (model, plain):
            for parameter in gpt.parameters():
                parameter.mul_(1.5)
    step = model.step
    gives_the_tokens_of(plain, model)
    assert model.step is step


def load_by_copying(model, other):
    model.load_state_dict(other.state_dict())


def load_by_assigning(model, other):
    model.load_state_dict(other.state_dict(), assign=True)
    model.tie()


def replace_parameters(model, other):
    for ours, theirs in zip(model.modules(), other.modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(ours, name, torch.nn.Parameter(parameter.detach().clone()))
    model.tie()


def replace_data(model, other):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data = theirs.detach().clone()


def replace_layers(model, other):
    model.blocks[1] = other.blocks[1]
    model.embed, model.head, model.norm = other.embed, other.head, other.norm
    model.blocks[0].mlp = other.blocks[0].mlp
    model.blocks[0].attn.qkv = other.blocks[0].attn.qkv
    model.blocks[0].attn.out = other.blocks[0].attn.out
    model.blocks[0].attn_norm, model.blocks[0].mlp_norm = (
        other.blocks[0].attn_norm,
        other.blocks[0].mlp_norm,
    )
    assert len(model.blocks) == 2


CHANGES = [load_by_copying, load_by_assigning, replace_parameters, replace_data, replace_layers]


@NEEDS_COMPILER
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_weights_that_are_replaced(change, packed, monkeypatch):
    """The oracle is a model that never had a step."""
    model, plain = compiled_and_plain(packed)
    change(model, tiny_gpt(CONFIGS["llama-like"], seed=5))
    change(plain, tiny_gpt(CONFIGS["llama-like"], seed=5))
    calls = counted(monkeypatch)
    gives_the_tokens_of(plain, model)
    assert calls
    assert model.step is not None


class Lora(torch.nn.Module):
    """An update of low rank."""

    def forward(self, weight):
        return weight + 0.5 * weight.roll(1, dims=0)


def parametrize(model):
    for block in model.blocks:
        torch.nn.utils.parametrize.register_parametrization(block.mlp.up, "weight", Lora())


class Scaled(torch.nn.Module):
    """A layer around another one, as adapters have it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 3


def wrap(model):
    model.blocks[0].mlp.down = Scaled(model.blocks[0].mlp.down)


def hook(model):
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * 3)


def hook_before(model):
    model.blocks[0].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))


def replace_forward(model):
    model.blocks[0].mlp.forward = lambda x: x * 3


STRANGERS = [parametrize, wrap, hook, hook_before, replace_forward]
CONVERSIONS = {
    "int8": lambda model: model.quantize("int8"),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "a part in bfloat16": lambda model: model.blocks[0].mlp.to(torch.bfloat16).float(),
    "unpacked": lambda model: model.unpack(),
}


@NEEDS_COMPILER
@pytest.mark.parametrize("change", [*STRANGERS, *CONVERSIONS.values()])
def test_it_is_dropped_if_the_model_becomes_another_one(change, caplog):
    model, plain = compiled_and_plain()
    change(model), change(plain)
    gives_the_tokens_of(plain, model)
    follows = change is CONVERSIONS["a part in bfloat16"]  # and back to float32
    assert (model.step is not None) == follows
    if change is not CONVERSIONS["unpacked"] and not follows:
        assert "the compiled step is dropped" in caplog.text


@pytest.mark.parametrize("change", STRANGERS)
def test_what_a_step_would_not_repeat_is_refused(change):
    """A program lies on disk for all models of its shape: what one had would be in all."""
    model = tiny_gpt(CONFIGS["llama-like"])
    change(model)
    with pytest.raises(gptk.IncompatibleError, match=r"the step cannot be compiled: .*blocks\.0"):
        gptk.compile_step(model)


@NEEDS_COMPILER
def test_a_copy_of_the_model_has_no_step():
    model, _ = compiled_and_plain()
    assert copy.deepcopy(model).step is None
    assert model.step is not None


@pytest.mark.parametrize("change", [*CHANGES, *STRANGERS, *CONVERSIONS.values()])
def test_a_recorded_step_follows_or_is_dropped(change):
    """With a recorder that, like CUDA's graphs, goes on with the tensors of its first run."""
    plain, model = (tiny_gpt(CONFIGS["llama-like"]) for _ in range(2))

    def record(run):
        frozen = [weight.detach().clone() for _, _, weight in weights_of(model)]

        def replay():
            with compiled.weights_replaced(model, frozen):
                return run()

        return replay

    model.step = compiled.RecordedStep(model, record)
    gives_the_tokens_of(plain, model)
    for gpt in (plain, model):
        other = [tiny_gpt(CONFIGS["llama-like"], seed=5)] if change in CHANGES else []
        change(gpt, *other)
    gives_the_tokens_of(plain, model)


UNCOMPILED = {
    "one row": ({}, None),
    "beams": ({"sampler": "beam:3"}, "several rows are decoded together"),
    "results": ({"sampler": "multinomial", "n": 2}, "several rows are decoded together"),
    "candidates": ({"sampler": "contrastive"}, "several rows are decoded together"),
    "layers": ({"sampler": "dola:layers=high"}, "the strategy reads the states of layers"),
    "a draft": ({"draft": "lookup:1"}, "several tokens are read at once"),
    "a full window": ({"overflow": "slide", "max_new_tokens": 95}, "the whole window"),
}


@pytest.mark.parametrize("case", [*UNCOMPILED, "a batch"])
def test_where_the_step_is_not_used_a_line_says_so_once_and_why(case, monkeypatch, caplog):
    """With a recorder that, instead of CUDA's, runs the operations each time."""
    monkeypatch.setattr("gptk.system.notices._told", set())
    model = tiny_gpt(CONFIGS["llama-like"])
    model.step = compiled.RecordedStep(model, lambda run: run)
    settings, why = UNCOMPILED.get(case, UNCOMPILED["beams"])
    batch = [[1, 2, 1, 2, 1], [4, 5]] if case == "a batch" else [[1, 2, 1, 2, 1]]
    settings = {} if case == "a batch" else settings
    for _ in range(2):
        chosen = {"max_new_tokens": 6, "ignore_eos": True} | settings
        gptk.LanguageModel(model).generate_batch(batch, **chosen)
    told = [r.getMessage() for r in caplog.records if "compiled step" in r.getMessage()]
    assert len(told) == (0 if why is None else 1)
    for line in told:
        assert line.startswith("the compiled step (--compile) is not used here: ")
        assert why in line


def compiled_and_plain(packed=False):
    """Two equal models, one with a compiled step."""
    models = [tiny_gpt(CONFIGS["llama-like"]) for _ in range(2)]
    if packed:
        models[0].pack()
    return gptk.compile_step(models[0]), models[1]


def gives_the_tokens_of(plain, model):
    settings = {"max_new_tokens": 12, "ignore_eos": True}
    got, want = (gptk.LanguageModel(gpt).generate([1, 2], **settings) for gpt in (model, plain))
    assert got.tokens == want.tokens
    assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-3)


@NEEDS_COMPILER
def test_training_drops_it():
    model = gptk.compile_step(tiny_gpt(CONFIGS["llama-like"]))
    assert model.step is not None
    assert model.train().step is None


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_recorded_step_gives_the_logits_of_the_plain_one(name):
    """With a recorder that, instead of CUDA's, runs the operations each time."""
    config, recorded = CONFIGS[name], []
    model, plain = tiny_gpt(config), tiny_gpt(config)
    model.step = compiled.RecordedStep(model, lambda run: recorded.append(run) or run)
    sessions = [gptk.DecodeSession(gpt, [[1, 2, 3]], capacity=5) for gpt in (plain, model)]
    for token in range(config.context_length - 3):  # past all memory reserved
        logits = [session.extend(torch.tensor([token])) for session in sessions]
        torch.testing.assert_close(*logits, **CLOSE)
        torch.testing.assert_close(sessions[0].hidden, sessions[1].hidden, **CLOSE)
    assert 1 < len(recorded) < 8  # once for each size of the cache
    for session in sessions:
        session.rewind(4)
    torch.testing.assert_close(*[s.extend(torch.tensor([7])) for s in sessions], **CLOSE)
    # Another text has another cache.
    got, want = (
        gptk.LanguageModel(gpt).generate([4, 5], max_new_tokens=8) for gpt in (model, plain)
    )
    assert got.tokens == want.tokens


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_cuda_graph_gives_the_logits_of_the_plain_step(name):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    plain = gptk.LanguageModel(tiny_gpt(CONFIGS[name]).to("cuda"))
    graph = gptk.LanguageModel(gptk.compile_step(tiny_gpt(CONFIGS[name]).to("cuda")))
    assert isinstance(graph.model.step, compiled.RecordedStep)
    for prompt in ([1, 2, 3], [4, 5]):
        settings = {"max_new_tokens": 16, "ignore_eos": True}
        got, want = (lm.generate(prompt, **settings) for lm in (graph, plain))
        assert got.tokens == want.tokens
        assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-3)


def test_other_devices_are_refused():
    with pytest.raises(gptk.DeviceError, match="on cpu and on cuda, not on meta"):
        gptk.compile_step(tiny_gpt(CONFIGS["llama-like"]).to("meta"))


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path))

    def fail(*args, **settings):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(gptk.DeviceError, match=r"cannot be compiled here: no C\+\+ compiler$"):
        gptk.compile_step(tiny_gpt(CONFIGS["llama-like"]))
    assert not list(tmp_path.rglob("*.pt2"))


@NEEDS_COMPILER
@pytest.mark.slow
def test_compiled_layer_norms_biases_and_learned_positions(monkeypatch):
    is_equal_to_the_plain_model(CONFIGS["gpt2-like"], monkeypatch)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_compiled_quantized_weights(precision, monkeypatch):
    """With activations in float32: PyTorch's kernels round them to bfloat16, gptk's to 15 bits."""
    error = 1e-3 if kernels.available() else 0.05
    is_equal_to_the_plain_model(
        CONFIGS["llama-like"],
        monkeypatch,
        lambda model: model.quantize(precision).pack(),
        {"rtol": error, "atol": error},
    )


@NEEDS_COMPILER
def test_the_command_compiles_says_so_and_gives_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path))
    tiny_lm().save(tmp_path / "model")
    words = ["generate", "Hi", "--model", str(tmp_path / "model"), "--max-new-tokens", "12"]
    plain = CliRunner().invoke(cli, words)
    first = CliRunner().invoke(cli, [*words, "--compile"])
    again = CliRunner().invoke(cli, [*words, "--compile"])
    assert plain.exit_code == 0
    assert plain.stdout == first.stdout == again.stdout
    assert "compiling" in first.stderr
    assert "compiling" not in again.stderr
