"""The compiled step: the same results, and one program on disk for all models of a shape."""

import pytest
import torch
from click.testing import CliRunner

import gptk
from gptk import kernels
from gptk.cli import cli
from gptk.model import compiled
from gptk.testing import tiny_gpt, tiny_lm
from toys import CONFIGS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


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


def test_a_compiled_step_gives_the_logits_of_the_plain_one(monkeypatch):
    is_equal_to_the_plain_model(CONFIGS["llama-like"], monkeypatch)


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


def test_a_damaged_program_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path))
    config, announced = CONFIGS["llama-like"], []
    program = compiled.cache_folder() / f"step-{compiled._key(tiny_gpt(config))}.pt2"
    program.write_bytes(b"PK and no more")
    gptk.compile_step(tiny_gpt(config), lambda: announced.append(1))
    assert announced
    gptk.compile_step(tiny_gpt(config), lambda: announced.append(1))
    assert len(announced) == 1


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


@pytest.mark.slow
def test_compiled_layer_norms_biases_and_learned_positions(monkeypatch):
    is_equal_to_the_plain_model(CONFIGS["gpt2-like"], monkeypatch)


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
