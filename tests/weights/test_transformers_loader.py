"""The loader `transformers`, on directories that transformers wrote."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptk
from architectures import ARCHITECTURES, small_model
from checkpoints import random_model
from gptk import SourceError
from gptk_plugins.loaders import _huggingface_config
from gptk_plugins.loaders._huggingface_config import FAMILIES

PROMPT = [5, 80, 17, 33]
WITHOUT_CODE = "granite"
"""An architecture that gptk has no code for."""


def written(kind, folder):
    model = small_model(kind)
    model.save_pretrained(folder)
    return model


def load(source):
    return gptk.load(source, device="cpu", dtype="float32", tokenizer="bytes")


@torch.inference_mode()
def check(lm, want):
    ids = torch.tensor([PROMPT])
    got = lm.model.logits(lm.model.states(ids, None, None, ())[:, :, 0])
    assert (got - want(ids, use_cache=False).logits).abs().max() <= 1e-5 * 10


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_directory_is_run_by_transformers(kind, tmp_path):
    model = written(kind, tmp_path)
    lm = load(f"transformers:{tmp_path}")
    assert isinstance(lm.model, gptk.TransformersModel)
    check(lm, model)
    assert lm.to_dict()["config"]["architecture"] == type(model).__name__


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - FAMILIES.keys()))
def test_so_is_by_itself_one_of_a_family_without_code(kind, tmp_path):
    written(kind, tmp_path)
    assert isinstance(load(str(tmp_path)).model, gptk.TransformersModel)


def test_without_transformers_its_extra_is_named(tmp_path, monkeypatch):
    written(WITHOUT_CODE, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers.models.auto.modeling_auto", None)
    monkeypatch.setattr(_huggingface_config, "find_spec", lambda _: None)
    with pytest.raises(SourceError, match=r"'granite' is not supported.*\[transformers\]'"):
        load(str(tmp_path))


def test_a_family_with_code_is_run_by_it_unless_asked_for(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path)).model, gptk.GPT)
    both = [load(source) for source in (str(tmp_path), f"transformers:{tmp_path}")]
    assert isinstance(both[1].model, gptk.TransformersModel)
    tokens = [lm.generate(PROMPT, max_new_tokens=8, ignore_eos=True).tokens for lm in both]
    assert tokens[0] == tokens[1]


def edited(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | fields
    path.write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
        ({"num_hidden_layers": 4}, "lack the tensors"),
        ({"num_hidden_layers": 2}, "nothing in the model uses the tensors"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers, and"),
        ({"vocab_size": 10**9}, "describes"),
        ({"intermediate_size": 90}, "cannot be read by transformers|other shapes"),
        ({"hidden_act": "no-such"}, "cannot be read by transformers"),
        ({"max_position_embeddings": None}, "cannot be read|no max_position_embeddings"),
        ({"is_encoder_decoder": True}, "an encoder"),
    ],
)
def test_a_wrong_directory_is_an_error_of_one_line(fields, message, tmp_path):
    written(WITHOUT_CODE, tmp_path)
    edited(tmp_path, **fields)
    with pytest.raises(gptk.GptkError, match=message) as raised:
        load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_code_in_a_directory_is_never_run(tmp_path):
    """auto_map names code beside the weights, which trust_remote_code would run."""
    model = written(WITHOUT_CODE, tmp_path)
    (tmp_path / "theirs.py").write_text("raise SystemExit('run')\n", "utf-8")
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    edited(tmp_path, auto_map=code)
    check(load(str(tmp_path)), model)
    edited(tmp_path, model_type="theirs")
    with pytest.raises(SourceError, match="no causal language model of the type 'theirs'"):
        load(f"transformers:{tmp_path}")


def test_attention_of_a_hub_is_never_fetched(tmp_path):
    model = written(WITHOUT_CODE, tmp_path)
    edited(tmp_path, attn_implementation="owner/kernels", _attn_implementation="owner/kernels")
    check(load(str(tmp_path)), model)


def test_a_pickle_is_not_opened(tmp_path):
    written(WITHOUT_CODE, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="is a pickle"):
        load(str(tmp_path))


def test_a_tensor_too_many_is_named(tmp_path):
    written(WITHOUT_CODE, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"more.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    edited(tmp_path)
    with pytest.raises(SourceError, match=r"uses the tensors more\.weight"):
        load(str(tmp_path))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_rounding_is_refused(quantize, tmp_path):
    written(WITHOUT_CODE, tmp_path)
    with pytest.raises(gptk.OptionError, match=f"quantize {quantize} is for models that gptk has"):
        gptk.load(str(tmp_path), device="cpu", quantize=quantize, tokenizer="bytes")


def test_what_needs_a_gpt_says_so(tmp_path):
    written(WITHOUT_CODE, tmp_path)
    checkpoint = gptk.load_checkpoint(str(tmp_path))
    with pytest.raises(SourceError, match="not a model that gptk has code for"):
        gptk.build_model(checkpoint, "cpu", torch.float32)
    with pytest.raises(SourceError, match="holds a gptk"):
        load(str(tmp_path)).save(tmp_path / "saved")


def test_the_program_runs_one(tmp_path):
    written(WITHOUT_CODE, tmp_path)
    base = [sys.executable, "-m", "gptk"]
    told = subprocess.run(
        [*base, "info", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "format: Hugging Face, run by transformers" in told
    assert f"model type: {WITHOUT_CODE}" in told
    options = ["--tokenizer", "bytes", "--device", "cpu", "--json"]
    options += ["--max-new-tokens", "3"]
    done = subprocess.run(
        [*base, "generate", "abc", "--model", f"transformers:{tmp_path}", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    want = load(str(tmp_path)).generate("abc", max_new_tokens=3)
    assert json.loads(done.stdout)["tokens"] == want.tokens
