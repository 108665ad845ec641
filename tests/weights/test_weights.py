"""Weight loaders, compared with the code that the files are from, and their error messages."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llms_from_scratch.ch04 import GPTModel, GPTModelFast
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints
import gptk
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk.weights.saving import save_checkpoint
from gptk_plugins.gguf_file import read_gguf
from gptk_plugins.loaders.gguf import GGUF
from gptk_plugins.loaders.gptk_format import Gptk
from gptk_plugins.loaders.huggingface import HuggingFace
from gptk_plugins.loaders.llms_from_scratch import LLMsFromScratch


def build(checkpoint: gptk.Checkpoint) -> gptk.GPT:
    return build_model(checkpoint, "cpu", torch.float32)


@torch.inference_mode()
def logits(model: gptk.GPT, ids: Tensor) -> Tensor:
    return model.logits(model(ids))


@torch.inference_mode()
def furthest(model: gptk.GPT, oracle: torch.nn.Module, ids: Tensor) -> float:
    expected = oracle(ids)
    expected = expected if isinstance(expected, Tensor) else expected.logits
    assert expected.std() > 0.1, "the oracle's predictions are all the same"
    return float((logits(model, ids) - expected).abs().max())


def refusal(loader: gptk.WeightLoader) -> str:
    """The message of the SourceError that loading raises, checked to be a line of text."""
    with pytest.raises(gptk.SourceError) as caught:
        build(loader.load())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# --- SmolLM2 ---------------------------------------------------------------------------------

TEXT = (
    "A language model assigns probabilities to sequences of words. The first ones counted how "
    "often words followed each other in a corpus; later ones learned a vector for every word, and "
    "a network that makes of the vectors so far a prediction of the next. Capital cities: Paris, "
    "Berlin, Rome and 東京. def add(a, b):\n    return a + b\n"
)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> gptk.GPT:
    return build(GGUF(path=str(smollm2_path)).load())


@pytest.fixture(scope="module")
def smollm2_ids(smollm2_path: Path) -> Tensor:
    return torch.tensor([GGUF(path=str(smollm2_path)).load().tokenizer().encode(TEXT)])


def test_smollm2_predicts_what_transformers_predicts(smollm2, hf_smollm2, smollm2_ids):
    assert furthest(smollm2, hf_smollm2, smollm2_ids) < 1e-3


def test_smollm2_gives_a_text_the_likelihood_that_transformers_gives(
    smollm2, hf_smollm2, smollm2_ids
):
    def mean_nll(predictions: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(predictions[0, :-1], smollm2_ids[0, 1:]))

    with torch.inference_mode():
        expected = mean_nll(hf_smollm2(smollm2_ids).logits)
    assert mean_nll(logits(smollm2, smollm2_ids)) == pytest.approx(expected, abs=1e-4)
    assert 0.5 < expected < 5


def test_smollm2_is_found_by_name():
    assert load_checkpoint("smollm2").config.n_layers == 30


def test_gguf_metadata_is_what_ggufs_own_reader_reads(tmp_path):
    path = tmp_path / "fields.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "", "é 東"])
    writer.add_array("numbers", [-1, 2, 3])
    writer.add_array("floats", [0.5, 1.25])
    writer.add_uint64("big", 2**40)
    writer.add_int8("small", -3)
    writer.add_bool("yes", True)
    writer.add_float64("pi", 3.25)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = {
        key: field.contents()
        for key, field in gguf.GGUFReader(path).fields.items()
        if not key.startswith("GGUF.")
    }
    assert read_gguf(path).fields == fields


# --- Hugging Face ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", checkpoints.CONFIGS)
def test_huggingface_models_predict_what_transformers_predicts(case, tmp_path):
    oracle = checkpoints.random_model(case)
    oracle.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    assert furthest(build(checkpoint), oracle, checkpoints.random_ids()) < 1e-4


@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_huggingface_shards_are_one_model(case, tmp_path):
    oracle = checkpoints.random_model(case)
    oracle.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    model = build(HuggingFace(path=str(tmp_path)).load())
    assert furthest(model, oracle, checkpoints.random_ids()) < 1e-4
    shards[1].unlink()
    assert f"the shard {shards[1].name} is missing" in refusal(HuggingFace(path=str(tmp_path)))


@pytest.mark.parametrize(("case", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_huggingface_names_may_lack_their_prefix_and_old_buffers_are_dropped(
    case, prefix, tmp_path
):
    oracle = checkpoints.random_model(case)
    oracle.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix(prefix): x.clone() for name, x in state.items()}
    for layer in range(2):
        if case == "gpt2":
            state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            state[f"layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, tmp_path / "model.safetensors")
    model = build(HuggingFace(path=str(tmp_path)).load())
    assert furthest(model, oracle, checkpoints.random_ids()) < 1e-4


def test_huggingface_bfloat16_is_kept_until_the_model_is_built(tmp_path):
    checkpoints.random_model("llama").bfloat16().save_pretrained(tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    checkpoint = HuggingFace(path=str(tmp_path)).load()
    assert {x.dtype for x in checkpoint.state.values()} == {torch.bfloat16}
    assert checkpoint.notes["stored as"] == "bfloat16"
    assert furthest(build(checkpoint), oracle.eval(), checkpoints.random_ids()) < 1e-4


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_stored_though_tied_counts_if_it_is_another_matrix(equal, tmp_path):
    oracle = checkpoints.random_model("qwen2")
    oracle.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    head = state["model.embed_tokens.weight"] * (1 if equal else -1)
    save_file({**state, "lm_head.weight": head}, tmp_path / "model.safetensors")
    checkpoint = HuggingFace(path=str(tmp_path)).load()
    assert checkpoint.config.tied_head is equal
    assert ("head" in checkpoint.notes) is not equal
    ids = checkpoints.random_ids()
    with torch.inference_mode():
        expected = oracle(ids).logits * (1 if equal else -1)
    assert torch.allclose(logits(build(checkpoint), ids), expected, atol=1e-4)


@pytest.mark.parametrize("case", ["mistral-window", "gemma3", "smollm3-windows", "qwen2-windows"])
def test_texts_may_be_longer_than_a_sliding_window(case, tmp_path):
    oracle = checkpoints.random_model(case)
    oracle.save_pretrained(tmp_path)
    checkpoint = HuggingFace(path=str(tmp_path)).load()
    assert checkpoint.config.window is not None
    assert checkpoint.config.window < 60
    assert checkpoint.config.context_length == 128
    assert furthest(build(checkpoint), oracle, checkpoints.random_ids(128)) < 1e-4


def test_longrope_is_read_up_to_where_other_factors_begin(tmp_path):
    """Longer texts have other factors for all their tokens, also for those that were read."""
    oracle = checkpoints.random_model("phi3-longrope")
    oracle.save_pretrained(tmp_path)
    checkpoint = HuggingFace(path=str(tmp_path)).load()
    assert checkpoint.config.context_length == 64
    assert checkpoint.notes["context"] == "64, limited from 128 by longrope"
    assert furthest(build(checkpoint), oracle, checkpoints.random_ids(64)) < 1e-4


REFUSED = [
    ("gpt2", {"model_type": "pelican"}, "the model type 'pelican' is not supported; gpt2, llama"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' is not supported"),
    (
        "gpt2",
        {"scale_attn_weights": False},
        "scale_attn_weights is False; it must be True",
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"n_embd": "many"}, "json: n_embd is 'many'; it must be a whole number"),
    ("gpt2", {"n_layer": None}, "n_layer is None"),
    ("gpt2", {"n_positions": 32}, "wpe.weight of shape (1024, 64) does not make embed_positions"),
    ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; it must be 'silu' or 'swish'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'; default,"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters has no factor"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear"}},
        "config.json: rope_parameters has no factor",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"attention_bias": True}, "self_attn.q_proj.bias is missing"),
    ("llama", {"num_hidden_layers": 1}, "nothing in the model uses the tensors model.layers.1."),
    ("llama", {"num_hidden_layers": 3}, "the tensor model.layers.2"),
    ("llama", {"num_attention_heads": 3}, "3 query heads cannot share 2"),
    ("llama", {"intermediate_size": 90}, "mlp.gate_proj.weight + "),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED)
def test_huggingface_configurations_that_do_not_fit_are_refused(case, changes, message, tmp_path):
    checkpoints.random_model(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert message in refusal(HuggingFace(path=str(tmp_path)))


def test_huggingface_directories_that_lack_something_say_what(tmp_path):
    folder = tmp_path / "model"
    checkpoints.random_model("gpt2").save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 1000, len(whole) // 2):
        weights.write_bytes(whole[:size])
        assert "cut short or damaged" in refusal(HuggingFace(path=str(folder)))
    weights.unlink()
    assert "no model.safetensors" in refusal(HuggingFace(path=str(folder)))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "pytorch_model.bin is a pickle" in refusal(HuggingFace(path=str(folder)))
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(HuggingFace(path=str(folder)))
    (folder / "config.json").unlink()
    assert "config.json: there is no such file" in refusal(HuggingFace(path=str(folder)))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("source", ["nobody/nothing-here", "huggingface:path=nobody/nothing-here"])
def test_a_hub_id_that_is_not_to_be_had_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        gptk.SourceError,
        match=r"at .nobody/nothing-here.: no such .*, and not available",
    ):
        load_checkpoint(source)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has `somebody/small` and `small`; returns the ids that it was asked for."""
    checkpoints.random_model("gpt2").save_pretrained(tmp_path / "hub")
    asked: list[str] = []

    def snapshot_download(hub_id, *, revision, allow_patterns, ignore_patterns):
        asked.append(hub_id)
        if hub_id not in ("somebody/small", "small"):
            raise OSError(f"404 Client Error: there is no {hub_id}\nmore lines")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return asked


@pytest.mark.parametrize("hub_id", ["somebody/small", "small"])
def test_a_name_that_nothing_here_has_is_a_hub_id(hub_id, hub):
    """As in transformers: `from_pretrained("gpt2")`, "distilgpt2"."""
    assert load_checkpoint(hub_id).config.n_layers == 2
    assert load_checkpoint(f"huggingface:path={hub_id}").config.n_layers == 2
    assert hub == [hub_id, hub_id]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("absent", True),
        ("some.body/absent-1.5b", True),
        ("smollm", True),
        ("model.gguf", False),
        ("model.pth", False),
        ("./small", False),
        ("a/b/c", False),
        ("../small", False),
        ("two words", False),
        ("größe", False),
        ("-small", False),
        ("small:revision=main", False),
        ("", False),
        ("a\0b", False),
        ("x" * 300, True),
        ("/dev/null", False),
        ("/dev/zero", False),
    ],
)
def test_a_source_that_is_nowhere_says_what_was_tried(source, asked, hub):
    with pytest.raises(gptk.SourceError) as caught:
        load_checkpoint(source)
    message = str(caught.value)
    assert message.isprintable()
    assert ("not available from the Hugging Face hub: 404 Client Error" in message) is asked
    assert hub == ([source] if asked else [])
    if asked:
        assert f"no model at '{source}'" in message
        assert "smollm2" in message, "the loaders are named"
    if source == "smollm":
        assert "did you mean smollm2?" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gguf:path=a,path=b", "gives path twice"),
        ("gguf:", "has no value after 'gguf:'"),
        ("gguf:path=", "has no value for path"),
        ("gptk:a,b", "has 'b' without the name of its option"),
    ],
)
def test_a_misspelt_spec_of_a_known_loader_says_what_is_wrong(source, words, hub):
    with pytest.raises(gptk.SpecError) as caught:
        load_checkpoint(source)
    assert words in str(caught.value)
    assert hub == []


def test_what_is_here_wins_over_the_hub_and_is_never_passed_over(hub, tmp_path):
    shutil.copytree(tmp_path / "hub", "small")
    assert load_checkpoint("small").config.n_layers == 2
    os.remove("small/config.json")
    with pytest.raises(gptk.SourceError, match="small is not a model that gptk can read"):
        load_checkpoint("small")
    shutil.rmtree("small")
    Path("small").write_text("a file")
    with pytest.raises(gptk.SourceError, match="small is not a model that gptk can read"):
        load_checkpoint("small")
    os.mkdir("somebody")
    with pytest.raises(gptk.SourceError, match="no model at 'somebody/small': no such file"):
        load_checkpoint("somebody/small")
    os.mkfifo("gpt2")
    with pytest.raises(gptk.SourceError, match="gpt2 is a FIFO, not a file"):
        load_checkpoint("gpt2")
    assert hub == []


def test_a_loaders_name_is_no_hub_id(hub):
    assert load_checkpoint("smollm2").config.n_layers == 30
    with pytest.raises(gptk.OptionError, match="loader nanogpt needs the option path"):
        load_checkpoint("nanogpt")
    assert hub == []


# --- GGUF ------------------------------------------------------------------------------------

GGUF_CASES = [
    "gpt2",
    "llama",
    "llama-biases-tied",
    "llama-llama3-rope",
    "llama-linear-rope",
    "mistral",
    "qwen2",
    "qwen2-untied",
    "qwen3",
    "qwen3-moe",
    "mixtral-full",
    "llama-yarn",
    "phi3",
    "phi3-longrope",
    "olmo2",
    "smollm3",
    "gemma2-usual",
    "gemma3",
    "gemma3-sixth",
    "gpt-neox",
]


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_models_predict_what_transformers_predicts(case, tmp_path):
    oracle = checkpoints.random_model(case)
    checkpoints.write_gguf(tmp_path / "model.gguf", oracle)
    checkpoint = load_checkpoint(str(tmp_path / "model.gguf"))
    assert checkpoint.config.tied_head is bool(oracle.config.tie_word_embeddings)
    assert furthest(build(checkpoint), oracle, checkpoints.random_ids()) < 1e-4


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2", "qwen3"])
def test_gguf_models_are_the_ones_that_transformers_reads(case, tmp_path):
    checkpoints.write_gguf(tmp_path / "model.gguf", checkpoints.random_model(case))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    model = build(GGUF(path=str(tmp_path / "model.gguf")).load())
    assert furthest(model, theirs, checkpoints.random_ids()) < 1e-4


@pytest.mark.parametrize("case", ["llama", "gemma3", "mixtral-full"])
def test_a_gguf_file_in_parts_is_one_model(case, tmp_path):
    oracle = checkpoints.random_model(case)
    checkpoints.write_gguf(tmp_path / "model.gguf", oracle, split_max_tensors=9)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) > 2
    model = build(GGUF(path=str(parts[0])).load())
    assert furthest(model, oracle, checkpoints.random_ids()) < 1e-4
    assert f"load the first, {parts[0].name}" in refusal(GGUF(path=str(parts[1])))
    shutil.copy(parts[0], tmp_path / "other.gguf")
    assert "its name must be NAME-00001-of-" in refusal(GGUF(path=str(tmp_path / "other.gguf")))
    shutil.copy(parts[1], parts[2])
    assert f"{parts[2].name} is part 2 of" in refusal(GGUF(path=str(parts[0])))
    parts[1].unlink()
    assert f"{parts[1].name} is missing" in refusal(GGUF(path=str(parts[0])))


@pytest.mark.parametrize("case", ["gpt2", "llama", "mixtral-full", "gemma3"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_gguf_models_predict_what_rounded_weights_predict(case, kind, tmp_path):
    oracle = checkpoints.random_model(case)
    checkpoints.write_gguf(tmp_path / "model.gguf", oracle, kind)
    checkpoints.round_weights(oracle, kind)
    checkpoint = GGUF(path=str(tmp_path / "model.gguf")).load()
    assert checkpoint.notes["stored as"] == ", ".join(sorted({kind, "F32"}))
    assert furthest(build(checkpoint), oracle, checkpoints.random_ids()) < 1e-4


@pytest.mark.parametrize(
    "kind",
    ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S"],
)
def test_every_block_type_is_dequantized_as_gguf_does(kind, tmp_path):
    stored = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
    raw = np.random.default_rng(0).integers(0, 256, (5, 3, block_bytes), dtype=np.uint8)
    scales = {"Q4_0": [1], "Q4_1": [1, 3], "Q8_0": [1]}.get(kind, ...)
    raw[:, :, scales] %= 120  # the high byte of a float16 that is finite
    raw[::2, :, scales] |= 128 * (kind in ("Q4_0", "Q4_1", "Q8_0"))  # some are negative
    raw = raw.reshape(5, -1)
    path = tmp_path / "tensor.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("tensor", raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(path).tensors["tensor"]
    assert tensor.shape == (5, 3 * block)
    np.testing.assert_array_equal(tensor.read().numpy(), gguf.quants.dequantize(raw, stored))


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(path, checkpoints.random_model("llama"))
    return path


def test_a_gguf_file_cut_short_is_refused_wherever_it_ends(gguf_file):
    whole = gguf_file.read_bytes()
    for size in (0, 3, 8, 30, 300, 1000, len(whole) // 2, len(whole) - 40):
        gguf_file.write_bytes(whole[:size])
        message = refusal(GGUF(path=str(gguf_file)))
        assert re.search("cut short|not a GGUF file|cannot be read", message), (size, message)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_gguf_file_is_read_or_refused(data, gguf_file):
    whole = bytearray(gguf_file.read_bytes())
    metadata_ends = whole.rfind(b"ffn_norm.weight") + 100
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(4, metadata_ends))] = data.draw(st.integers(0, 255))
    damaged = gguf_file.with_name("damaged.gguf")
    damaged.write_bytes(whole)
    with contextlib.suppress(gptk.SourceError):
        build(GGUF(path=str(damaged)).load())


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_book_checkpoint_is_read_or_refused(data, legacy, tmp_path):
    path = tmp_path / "model.pth"
    if not path.exists():
        state = book_model().state_dict()
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 5000))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(whole)
    with contextlib.suppress(gptk.SourceError):
        build(LLMsFromScratch(path=str(damaged)).load())


def test_gguf_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "other.gguf"
    assert "there is no such file" in refusal(GGUF(path=str(path)))
    assert "is a directory, not a file" in refusal(GGUF(path=str(tmp_path)))
    path.write_bytes(b"PK\x03\x04 and so on")
    assert "is not a GGUF file" in refusal(GGUF(path=str(path)))
    path.write_bytes(b"GGUF\x01\0\0\0" + bytes(100))
    assert "GGUF version 1 is not supported" in refusal(GGUF(path=str(path)))


def patched(path: Path, old: bytes, new: bytes) -> GGUF:
    """The file with some bytes changed everywhere, none added."""
    whole = path.read_bytes()
    assert old in whole
    assert len(old) == len(new)
    path.write_bytes(whole.replace(old, new))
    return GGUF(path=str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", "'bloom' is not supported; gpt2"),
        (b"llama.block_count", b"llama.block_coun_", "the metadata of llama has no block_count"),
        (
            b"llama.attention.value_length\x04\0\0\0\x10",
            b"llama.attention.value_length\x04\0\0\0\x08",
            "attention.value_length is 8; only 16 is supported",
        ),
        (b"blk.1.ffn_norm.weight", b"blk.1.ffn_form.weight", "blk.1.ffn_norm.weight is missing"),
        (b"token_embd.weight", b"token_embx.weight", "token_embd.weight is missing"),
        (b"\0output.weight", b"\0outpux.weight", "nothing in the model uses the tensors outpux"),
    ],
)
def test_gguf_metadata_that_does_not_fit_is_named(old, new, message, gguf_file):
    assert message in refusal(patched(gguf_file, old, new))


def test_gguf_tensors_of_a_wrong_shape_are_named(gguf_file):
    # The feed-forward width, as stored: key, type 4 (a 32-bit number), value.
    key = b"llama.feed_forward_length\x04\0\0\0"
    loader = patched(gguf_file, key + b"\x60\0\0\0", key + b"\x40\0\0\0")
    assert "blk.0.ffn_gate.weight + blk.0.ffn_up.weight of shape (96, 64)" in refusal(loader)


# --- LLMs-from-scratch -----------------------------------------------------------------------


class Trap:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


BOOK = {
    "vocab_size": checkpoints.VOCABULARY,
    "context_length": 48,
    "emb_dim": 128,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def book_model(kind: type[torch.nn.Module] = GPTModel, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(BOOK | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", [GPTModel, GPTModelFast])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_books_model_predicts_what_its_code_predicts(kind, qkv_bias, tmp_path):
    oracle = book_model(kind, qkv_bias=qkv_bias)
    torch.save(oracle.state_dict(), tmp_path / "model.pth")
    checkpoint = load_checkpoint(str(tmp_path / "model.pth"))
    assert not checkpoint.config.tied_head
    assert checkpoint.config.context_length == 48
    assert furthest(build(checkpoint), oracle, checkpoints.random_ids()) < 1e-5


@pytest.mark.parametrize("legacy", [False, True])
def test_the_books_model_is_found_beside_its_optimizer(legacy, tmp_path):
    oracle = book_model(n_heads=4)
    optimizer = torch.optim.AdamW(oracle.parameters())
    oracle(checkpoints.random_ids(5)).sum().backward()
    optimizer.step()
    path = tmp_path / "model_and_optimizer.pth"
    both = {
        "model_state_dict": oracle.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    torch.save(both, path, _use_new_zipfile_serialization=not legacy)
    assert LLMsFromScratch.matches(str(path))
    model = build(load_checkpoint(f"llms-from-scratch:path={path},n_heads=4"))
    assert furthest(model, oracle, checkpoints.random_ids()) < 1e-5


def test_the_books_gpt2_comes_with_its_tokenizer(tmp_path):
    state = book_model(vocab_size=50257, n_layers=1).state_dict()
    torch.save(state, tmp_path / "model.pth")
    tokenizer = load_checkpoint(str(tmp_path / "model.pth")).tokenizer
    assert tokenizer is not None
    assert tokenizer().encode("Hello, I am") == [15496, 11, 314, 716]


def test_book_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    loader = LLMsFromScratch(path=str(path))
    assert "there is no such file" in refusal(loader)
    state = book_model().state_dict()

    torch.save(state, path)
    whole = path.read_bytes()
    for size in (0, 10, 1000, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert re.search("cut short", refusal(loader))
    assert LLMsFromScratch.matches(str(path)), "half a file is still told to be the book's"

    torch.save(state | {"more": torch.ones(1)}, path)
    assert "nothing in the model uses the tensors more" in refusal(loader)
    torch.save({name: x for name, x in state.items() if "out_head" not in name}, path)
    assert "out_head.weight is missing" in refusal(loader)
    torch.save(state | {"out_head.weight": torch.ones(2, 128)}, path)
    assert "out_head.weight of shape (2, 128)" in refusal(loader)
    torch.save({"weights": torch.ones(1)}, path)
    assert "is not the book's GPTModel" in refusal(loader)
    assert not LLMsFromScratch.matches(str(path))
    torch.save([1, 2], path)
    assert "holds a list" in refusal(loader)
    torch.save(book_model(emb_dim=96).state_dict(), path)
    assert "n_heads=N" in refusal(loader)
    torch.save({"tok_emb.weight": state["tok_emb.weight"], "trap": Trap(tmp_path / "sprung")}, path)
    assert "nothing in it was run" in refusal(loader)
    assert not (tmp_path / "sprung").exists()


# --- gptk ------------------------------------------------------------------------------------


def same_tokenizer(a: gptk.Tokenizer, b: gptk.Tokenizer) -> bool:
    def known(tokenizer: gptk.Tokenizer) -> dict[str, object]:
        encoding = tokenizer.encoding
        fields = dataclasses.fields(tokenizer)
        rest = {f.name: getattr(tokenizer, f.name) for f in fields} | {"encoding": 0}
        return rest | {
            "pattern": encoding._pat_str,
            "ranks": encoding._mergeable_ranks,
            "special": encoding._special_tokens,
        }

    return known(a) == known(b)


def small_checkpoint(case: str, folder: Path) -> gptk.Checkpoint:
    checkpoints.random_model(case).save_pretrained(folder)
    return HuggingFace(path=str(folder)).load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["gpt2", "llama-llama3-rope", "qwen3", "gpt2-untied-gelu"])
def test_a_saved_model_is_loaded_bit_for_bit(case, dtype, tmp_path):
    model = build_model(small_checkpoint(case, tmp_path / "hf"), "cpu", dtype)
    save_checkpoint(tmp_path / "saved", model, None)
    checkpoint = load_checkpoint(str(tmp_path / "saved"))
    assert checkpoint.config == model.config
    assert checkpoint.tokenizer is None
    again = build_model(checkpoint, "cpu", dtype)
    for (name, want), (_, got) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(want, got), name
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("head.weight" in stored) is not model.config.tied_head
    assert sorted(os.listdir(tmp_path)) == ["hf", "saved"], "nothing is left beside it"


def test_smollm2_is_saved_and_loaded_with_its_tokenizer(smollm2, smollm2_path, tmp_path):
    tokenizer = GGUF(path=str(smollm2_path)).load().tokenizer()
    save_checkpoint(tmp_path / "saved", smollm2, tokenizer)
    checkpoint = load_checkpoint(str(tmp_path / "saved"))
    for name, parameter in smollm2.named_parameters():
        assert torch.equal(checkpoint.state[name], parameter), name
    again = checkpoint.tokenizer()
    assert same_tokenizer(tokenizer, again)
    text = "Words, 123\x04\x16! \U0001f600"  # bytes that SmolLM2's vocabulary lacks among them
    assert again.encode(text) == tokenizer.encode(text)


def test_a_packed_model_is_saved_as_it_was(smollm2_path, tmp_path):
    model = build_model(GGUF(path=str(smollm2_path)).load(), "cpu", torch.bfloat16)
    want = {name: parameter.clone() for name, parameter in model.named_parameters()}
    save_checkpoint(tmp_path / "saved", model.pack(), None)
    state = load_checkpoint(str(tmp_path / "saved")).state
    assert state.keys() == want.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in want.items())
    model.train()
    assert model.head.weight is model.embed.weight
    trainable = dict(model.named_parameters())
    assert all(torch.equal(trainable[name], tensor) for name, tensor in want.items())


def test_saving_replaces_a_gptk_checkpoint_and_nothing_else(tmp_path):
    first = build(small_checkpoint("gpt2", tmp_path / "hf"))
    second = build(small_checkpoint("llama", tmp_path / "hf2"))
    saved = tmp_path / "saved"
    saved.mkdir()
    save_checkpoint(saved, first, None)
    save_checkpoint(saved, second, None)
    assert load_checkpoint(str(saved)).config == second.config

    with pytest.raises(gptk.SourceError, match="no gptk checkpoint; it is not overwritten"):
        save_checkpoint(tmp_path / "hf", first, None)
    with pytest.raises(gptk.SourceError, match="no gptk checkpoint; it is not overwritten"):
        save_checkpoint(tmp_path / "hf" / "config.json", first, None)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(gptk.SourceError, match=r"more than a gptk checkpoint \(notes.txt\)"):
        save_checkpoint(saved, first, None)
    assert load_checkpoint(str(saved)).config == second.config
    assert sorted(os.listdir(tmp_path)) == ["hf", "hf2", "saved"]


def test_saving_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = build(small_checkpoint("gpt2", tmp_path / "hf"))
    save_checkpoint(tmp_path / "saved", model, None)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(gptk.SourceError, match=r"cannot be written: .*No space left"):
        save_checkpoint(tmp_path / "saved", model, None)
    assert load_checkpoint(str(tmp_path / "saved")).config == model.config
    assert sorted(os.listdir(tmp_path)) == ["hf", "saved"]


def test_gptk_checkpoints_that_are_damaged_are_refused(tmp_path):
    from gptk_plugins.tokenizers.gpt2 import GPT2

    model = build(small_checkpoint("gpt2", tmp_path / "hf"))
    saved = tmp_path / "saved"
    save_checkpoint(saved, model, GPT2().load())
    loader = Gptk(path=str(saved))
    tokenizer = loader.load().tokenizer

    (saved / "tokenizer.tiktoken").write_text("!!! 3\n")
    with pytest.raises(gptk.TokenizerError, match="damaged"):
        tokenizer()
    (saved / "tokenizer.tiktoken").unlink()
    with pytest.raises(gptk.TokenizerError, match="no such file"):
        tokenizer()

    about = json.loads((saved / "gptk.json").read_text())
    save_checkpoint(saved, model, GPT2().load())
    for part in ({"pattern": "("}, {"special_tokens": {"<|x|>": 10**9}}):
        changed = about | {"tokenizer": about["tokenizer"] | part}
        (saved / "gptk.json").write_text(json.dumps(changed))
        with pytest.raises(gptk.TokenizerError, match=r"saved/gptk\.json, tokenizer: \w"):
            Gptk(path=str(saved)).load().tokenizer()

    def refusal_with(**changes: object) -> str:
        (saved / "gptk.json").write_text(json.dumps(about | changes))
        return refusal(loader)

    assert "format version 2; this gptk reads 1" in refusal_with(version=2)
    assert "wrong configuration" in refusal_with(config={})
    assert "wrong configuration" in refusal_with(config=about["config"] | {"experts": 8})
    assert "embed.weight of shape (97, 64)" in refusal_with(config=about["config"] | {"width": 60})
    assert "does not describe a gptk checkpoint" in refusal_with(format="other")
    (saved / "gptk.json").write_text(json.dumps(about))
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "cut short" in refusal(loader)
    weights.unlink()
    assert "there is no such file" in refusal(loader)
    shutil.rmtree(saved)
    assert "has no gptk.json" in refusal(loader)


# --- Building --------------------------------------------------------------------------------


def test_a_built_model_shares_memory_with_what_needs_no_conversion(tmp_path):
    checkpoint = small_checkpoint("qwen3", tmp_path)
    checkpoint = dataclasses.replace(checkpoint, state=dict(checkpoint.state))
    model = build(checkpoint)
    assert not model.training
    assert model.head.weight is model.embed.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == checkpoint.state[name].data_ptr()
    half = build_model(checkpoint, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.head.weight is half.embed.weight


def test_a_gpts_own_state_dict_builds_it_again(tmp_path):
    model = build(small_checkpoint("qwen3", tmp_path))
    again = build(gptk.Checkpoint(model.config, model.state_dict()))
    ids = checkpoints.random_ids()
    assert torch.equal(logits(model, ids), logits(again, ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": torch.ones(3)}, "norm.weight of shape (3,) does not make"),
        ({"norm.scale": torch.ones(3)}, "nothing in the model uses the tensors norm.scale"),
        ({"norm.weight": None}, "the tensor norm.weight is missing"),
        ({"head.weight": torch.ones(97, 64)}, "head.weight is not embed.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_configuration_is_named(changes, message, tmp_path):
    checkpoint = small_checkpoint("qwen3", tmp_path)
    state = {name: x for name, x in {**checkpoint.state, **changes}.items() if x is not None}
    with pytest.raises(gptk.SourceError, match=re.escape(message)):
        build(dataclasses.replace(checkpoint, state=state))


def test_a_source_that_nobody_knows_lists_the_formats(tmp_path):
    with pytest.raises(
        gptk.SourceError, match=r"no model at 'no/such/path'.*gguf, gptk, huggingface"
    ):
        load_checkpoint("no/such/path")
    with pytest.raises(gptk.SourceError, match="is not a model that gptk can read"):
        load_checkpoint(str(tmp_path))
