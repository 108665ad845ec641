"""Every field of a Hugging Face directory is honored as transformers 5 does, or refused by name.

The oracle is transformers: `AutoModelForCausalLM.from_pretrained` for the logits,
`generation_config` after it for the tokens that end a text.
"""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints
import gptk
from gptk.weights.building import build_model
from gptk_plugins.loaders.huggingface import HuggingFace

FAMILIES = {
    "gpt2": "gpt2",
    "llama": "llama-biases-tied",
    "mistral": "mistral-window",
    "qwen2": "qwen2",
    "qwen3": "qwen3-biases",
    "qwen3_moe": "qwen3-moe",
    "mixtral": "mixtral",
    "phi3": "phi3-longrope",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt_neox": "gpt-neox",
    "opt": "opt",
}
WITHOUT_ROPE = ("gpt2", "opt")
IDS = checkpoints.random_ids(24)

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}

ROPE: list[dict[str, Any]] = [
    {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
    {"rope_parameters": LINEAR, "rope_scaling": DEFAULT},
    {"rope_parameters": LINEAR, "rope_scaling": {}},
    {"rope_parameters": LINEAR, "rope_scaling": None},
    {"rope_parameters": {**DEFAULT, "rope_theta": 500.0}, "rope_theta": 50.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 50.0},
    {"rope_parameters": None, "rope_theta": 50.0},
    {"rope_parameters": None, "rope_theta": None},
    {"rope_parameters": {**DEFAULT, "rope_theta": None}},
    {"rope_parameters": {}, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 50.0},
    {"rope_parameters": {"rope_theta": 100.0, "type": "linear", "factor": 2}},
    {"rope_parameters": {**LINEAR, "type": "dynamic"}},
    {"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": None, "type": "linear", "factor": 2.0}},
    {"rope_parameters": {**LINEAR, "factor": 0.5}},
    {"rope_parameters": {**LINEAR, "factor": 0}},
    {"rope_parameters": {**LINEAR, "factor": -2.0}},
    {"rope_parameters": {**LINEAR, "factor": None}},
    {"rope_parameters": {**LINEAR, "factor": "4"}},
    {"rope_parameters": {**LINEAR, "attention_factor": 2.0, "mscale": 3.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"rope_parameters": {**YARN, "rope_theta": 100.0}},
    {"rope_parameters": {**YARN, "attention_factor": 1.5}},
    {"rope_parameters": {**YARN, "beta_fast": 3.0, "beta_slow": 2.0}},
    {"rope_parameters": {**YARN, "beta_fast": None, "truncate": False}},
    {"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.7}},
    {"rope_parameters": {**YARN, "mscale": 0.5}},
    {"rope_parameters": YARN, "original_max_position_embeddings": 64},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 4},
    {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}, "rope_theta": 7.0},
    {"rope_parameters": {k: v for k, v in LLAMA3.items() if k[0] != "o"}},
    {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
    {"rope_parameters": {**LLAMA3, "low_freq_factor": 8.0}},
    {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 0}},
    {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": 0.5, "rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}},
    {"partial_rotary_factor": 0.5, "rope_parameters": LINEAR},
    {"partial_rotary_factor": None},
    {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": LINEAR}},
    {"rope_parameters": {"full_attention": LINEAR, "rope_type": "default"}},
]
OTHER: dict[str, list[dict[str, Any]]] = {
    "gpt2": [
        {"hidden_size": 64},
        {"hidden_size": 32},
        {"n_head": 2, "num_attention_heads": 4},
        {"n_head": 4, "num_attention_heads": 2},
        {"num_attention_heads": 8},
        {"n_layer": 1, "num_hidden_layers": 2},
        {"n_positions": 7, "max_position_embeddings": 1024},
        {"layer_norm_epsilon": 0.1},
        {"layer_norm_epsilon": 1},
        {"n_inner": 256},
        {"n_inner": None},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "quick_gelu"},
        {"hidden_act": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"rope_parameters": LINEAR, "rope_theta": 5.0},
        {"tie_word_embeddings": True},
        {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    ],
    "llama": [
        {"head_dim": 16},
        {"head_dim": None},
        {"head_dim": 0},
        {"head_dim": 32},
        {"num_attention_heads": 8},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 4},
        {"attention_bias": False},
        {"mlp_bias": False},
        {"sliding_window": 4},
        {"sliding_window": 4, "use_sliding_window": True},
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4},
        {"pretraining_tp": 4},
        {"tie_word_embeddings": False},
    ],
    "mistral": [
        {"sliding_window": 4},
        {"sliding_window": 30},
        {"sliding_window": None},
        {"sliding_window": 0},
        {"sliding_window": 4, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2, "sliding_window": 4},
        {"head_dim": None},
        {"num_key_value_heads": None},
        {"attention_bias": True},
    ],
    "qwen2": [
        {"sliding_window": 4},
        {"sliding_window": 4, "use_sliding_window": True},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 4, "max_window_layers": 0},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
        {
            "sliding_window": 4,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 4},
        {"head_dim": 16},
        {"attention_bias": False},
        {"qkv_bias": False},
    ],
    "qwen3": [
        {"head_dim": None},
        {"attention_bias": False},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ],
    "qwen3_moe": [
        {"num_experts": 6},
        {"num_experts": 5},
        {"num_experts_per_tok": 2},
        {"num_experts_per_tok": 7},
        {"norm_topk_prob": False},
        {"moe_intermediate_size": 96},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [1]},
        {"mlp_only_layers": []},
        {"sliding_window": 4},
        {"use_sliding_window": True, "sliding_window": 4},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ],
    "mixtral": [
        {"num_local_experts": 4},
        {"num_experts": 5},
        {"num_experts_per_tok": 1},
        {"sliding_window": 4},
        {"sliding_window": None},
        {"router_jitter_noise": 0.5},
        {"head_dim": 32},
        {"hidden_act": "gelu"},
    ],
    "phi3": [
        {"sliding_window": 4},
        {"sliding_window": None},
        {"original_max_position_embeddings": 100},
        {"original_max_position_embeddings": 128},
        {"original_max_position_embeddings": 8},
        {"head_dim": 16},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 4096},
        {"partial_rotary_factor": 1.0},
        {"embd_pdrop": 0.5, "resid_pdrop": 0.5},
    ],
    "olmo2": [
        {"attention_bias": True},
        {"num_key_value_heads": None},
        {"head_dim": 16},
        {"clip_qkv": 1.0},
        {"sliding_window": 4},
        {"rms_norm_eps": 1e-2},
    ],
    "smollm3": [
        {"no_rope_layers": None},
        {"no_rope_layers": [1, 1, 1, 1, 1]},
        {"no_rope_layers": [0, 1, 0, 0, 1, 1]},
        {"no_rope_layers": [1, 1]},
        {"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None},
        {"no_rope_layer_interval": 2},
        {"no_rope_layer_interval": 0, "no_rope_layers": None},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": None},
        {"sliding_window": 4, "layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] + ["full_attention"] * 4,
        },
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
    "gemma2": [
        {"query_pre_attn_scalar": 7},
        {"query_pre_attn_scalar": 0},
        {"attn_logit_softcapping": None},
        {"attn_logit_softcapping": 0.5},
        {"final_logit_softcapping": None},
        {"final_logit_softcapping": 0},
        {"hidden_activation": "gelu"},
        {"hidden_act": "relu"},
        {"sliding_window": 4},
        {"sliding_window": None},
        {"layer_types": None},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["full_attention"] * 3, "sliding_window": None},
        {"layer_types": ["full_attention"]},
        {"sliding_window_pattern": 3, "layer_types": None},
        {"attention_bias": True},
        {"head_dim": 32},
    ],
    "gemma3_text": [
        {"query_pre_attn_scalar": 7},
        {"attn_logit_softcapping": 2.0},
        {"final_logit_softcapping": 2.0},
        {"sliding_window": 4},
        {"sliding_window_pattern": 2},
        {"sliding_window_pattern": 2, "layer_types": None},
        {"layer_types": None},
        {"layer_types": ["sliding_attention"] * 7},
        {"rope_parameters": None, "rope_local_base_freq": 50.0, "rope_theta": 500.0},
        {"rope_parameters": {"full_attention": LINEAR}, "rope_local_base_freq": 50.0},
        {"rope_parameters": {"sliding_attention": LINEAR}},
        {"rope_parameters": {"full_attention": None, "sliding_attention": None}},
        {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": DEFAULT}},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_local_base_freq": 50.0},
    ],
    "gpt_neox": [
        {"use_parallel_residual": False},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"attention_bias": False},
        {"layer_norm_eps": 0.5},
        {"rotary_pct": 0.25},
        {"rotary_pct": 1.0, "rope_parameters": None},
        {"rotary_emb_base": 50, "rope_parameters": None},
        {"rotary_emb_base": 50.0, "rotary_pct": 0.25, "rope_parameters": None},
        {"rotary_emb_base": 50.0},
        {"rope_theta": 50.0, "rope_parameters": None, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.3}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 2.0}},
        {"head_dim": 16},
        {"num_attention_heads": 8},
        {"num_attention_heads": 5},
        {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    ],
    "opt": [
        {"do_layer_norm_before": False},
        {"_remove_final_layer_norm": True},
        {"word_embed_proj_dim": None},
        {"word_embed_proj_dim": 32},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_new"},
        {"activation_function": "silu"},
        {"ffn_dim": 64},
        {"max_position_embeddings": 126},
        {"dropout": 0.5, "layerdrop": 0.9},
    ],
}
EVERY: list[dict[str, Any]] = [
    {},
    {"is_causal": False},
    {"is_causal": True},
    {"attention_dropout": 0.5},
    {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    {"logit_scale": 0.1, "embedding_multiplier": 3.0, "attention_multiplier": 0.5},
    {"torch_dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "float32", "torch_dtype": "float16"},
    {"architectures": ["SomethingElse"]},
    {"per_layer_config": {"0": {"attention_dropout": 0.5}}},
    {"is_decoder": True},
    {"is_encoder_decoder": True},
    {"use_cache": False},
    {"output_attentions": True},
    {"pad_token_id": 3},
    {"attn_implementation": "eager"},
    {"chunk_size_feed_forward": 4},
    {"pruned_heads": {"0": [1]}},
    {"vocab_size": 96},
    {"vocab_size": 98},
    {"use_bidirectional_attention": True},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"model_type": "gemma"},
    {"attention_chunk_size": 4},
]
HUGE: list[dict[str, Any]] = [
    {"head_dim": 2_000_000_000, "rope_parameters": LLAMA3},
    {"head_dim": 2_000_000_000},
    {"num_hidden_layers": 10**9},
    {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
    {"vocab_size": 10**9},
    {"max_position_embeddings": 10**18},
    {"rope_theta": float("nan"), "rope_parameters": None},
    {"rope_theta": float("inf"), "rope_parameters": None},
    {"rope_theta": -1.0, "rope_parameters": None},
    {"rms_norm_eps": -1.0},
    {"rms_norm_eps": "1e-5"},
    {"num_attention_heads": True},
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each family."""
    folder = tmp_path_factory.mktemp("families")
    for family, case in FAMILIES.items():
        checkpoints.random_model(case).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


@torch.inference_mode()
def theirs(folder: Path, time: int = IDS.shape[1]) -> Any:
    """The logits of transformers; the exception, where it refuses to load or to run the model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            found = model.eval()(IDS[:, :time]).logits
    except Exception as error:
        return error
    # transformers makes weights up, or leaves some out, where gptk refuses.
    if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return ValueError(report)
    return found


LENIENT = "read, though transformers refuses its type: 1 for 1.0, or a field without effect"


@torch.inference_mode()
def check(folder: Path, changes: dict[str, Any], without_effect: Tensor | None = None) -> str:
    """Compare with transformers; returns `equal`, LENIENT, or the message of the refusal.

    without_effect: the logits that are right, too, where transformers fails.
    """
    try:
        model = build_model(HuggingFace(path=str(folder)).load(), "cpu", torch.float32)
    except gptk.SourceError as error:
        return str(error)
    time = min(IDS.shape[1], model.config.context_length)
    expected = theirs(folder, time)
    if isinstance(expected, StrictDataclassFieldValidationError):
        return LENIENT
    if isinstance(expected, Exception) and without_effect is not None:
        expected = without_effect
    assert not isinstance(expected, Exception), f"{changes} is read; transformers: {expected}"
    found = model.logits(model(IDS[:, :time]))
    torch.testing.assert_close(found, expected[:, :time], atol=1e-4, rtol=0, msg=str(changes))
    return "equal"


def changed(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of a model, by links, with fields of its config.json changed."""
    target.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    if not (target / "model.safetensors").exists():
        (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_are_read_as_transformers_reads_them_or_refused(family, stored, tmp_path):
    cases = [*EVERY, *OTHER[family], *([] if family in WITHOUT_ROPE else ROPE)]
    found = {}
    for changes in cases:
        folder = changed(stored[family], tmp_path / "model", changes)
        found[json.dumps(changes)] = check(folder, changes)
    refused = {case: told for case, told in found.items() if told not in ("equal", LENIENT)}
    assert "{}" not in refused
    assert 5 < len(refused) < len(found) - 10
    for case, message in refused.items():
        # The message names a field that was changed, or the tensors that do not fit it.
        assert any(name in message for name in [*names_in(json.loads(case)), "tensor", "shape"]), (
            case,
            message,
        )


def names_in(value: Any) -> list[str]:
    """All keys of nested objects."""
    if not isinstance(value, dict):
        return []
    names = [name for key, item in value.items() for name in (key, *names_in(item))]
    return [*names, "model type"] if "model_type" in value else names


@pytest.mark.parametrize("family", FAMILIES)
def test_several_fields_at_once_are_read_as_transformers_reads_them_or_refused(
    family, stored, tmp_path
):
    rng = random.Random(family)
    cases = [*EVERY, *OTHER[family], *([] if family in WITHOUT_ROPE else ROPE)]
    unchanged = theirs(stored[family])
    for _ in range(40):
        changes = {key: x for case in rng.sample(cases, 3) for key, x in case.items()}
        check(changed(stored[family], tmp_path / "model", changes), changes, unchanged)


@pytest.mark.parametrize("changes", HUGE, ids=str)
def test_sizes_and_numbers_that_no_model_has_are_refused_at_once(changes, stored, tmp_path):
    folder = changed(stored["llama"], tmp_path / "model", changes)
    with pytest.raises(gptk.SourceError):
        build_model(HuggingFace(path=str(folder)).load(), "cpu", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_field_of_transformers_own_is_read_as_it_reads_it_or_refused(family, stored, tmp_path):
    """All fields of the configuration's class, with values of its type and others."""
    fields = transformers.AutoConfig.from_pretrained(stored[family]).to_dict()
    rng = random.Random(family)
    unchanged = theirs(stored[family])
    for name in sorted(fields):
        if name in ("transformers_version", "model_type", "_name_or_path"):
            continue
        for value in (None, True, False, 0, 1, 2, 3, 4, 0.5, "x", [], {}, rng.random()):
            folder = changed(stored[family], tmp_path / "model", {name: value})
            check(folder, {name: value}, unchanged)


# --- Heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt2", "qwen2", "qwen3"])
@pytest.mark.parametrize("kept", ["embedding", "head", "both"])
def test_a_tied_matrix_is_found_by_either_of_its_names(case, kept, tmp_path):
    oracle = checkpoints.random_model(case)
    oracle.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embedding = next(name for name in state if name.endswith(("wte.weight", "embed_tokens.weight")))
    matrix = state.pop(embedding)
    state |= {embedding: matrix} if kept != "head" else {}
    state |= {"lm_head.weight": matrix.clone()} if kept != "embedding" else {}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert check(tmp_path, {}) == "equal"


def test_an_untied_head_that_is_missing_is_refused(tmp_path):
    """transformers makes a random one, with a warning."""
    checkpoints.random_model("qwen2-untied").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        save_file({n: x for n, x in state.items() if n != name}, tmp_path / "model.safetensors")
        assert f"{name} is missing" in check(tmp_path, {})


# --- Tokens that end a text ------------------------------------------------------------------

IDS_OF_ENDS: list[Any] = [None, 0, 5, [0, 2], [2, 0], [5], [2, 2, 5], []]
ABSENT = "absent"


def write_tokenizer(folder: Path, eos: str | None) -> None:
    """A byte-level BPE of six tokens, of which tokenizer_config.json names one as the end."""
    vocabulary = {chr(97 + number): number for number in range(6)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": n, "content": chr(97 + n), "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
            for n in (0, 2, 5)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))


def write_ids(path: Path, kind: str, value: Any, base: dict[str, Any]) -> None:
    fields = dict(base)
    fields.pop(kind, None)
    if value != ABSENT:
        fields[kind] = value
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", ["eos_token_id", "bos_token_id"])
def test_a_text_ends_and_begins_with_the_tokens_that_transformers_takes(kind, stored, tmp_path):
    folder = changed(stored["llama"], tmp_path / "model", {})
    config = json.loads((folder / "config.json").read_text())
    write_tokenizer(folder, eos="c")
    rng = random.Random(kind)
    values = [*IDS_OF_ENDS, ABSENT] if kind == "eos_token_id" else [None, 0, 5, ABSENT]
    pairs = [(c, g) for c in values for g in [*values, "no file"]]
    compared = 0
    for in_config, in_generation in rng.sample(pairs, min(len(pairs), 24)):
        write_ids(folder / "config.json", kind, in_config, config)
        path = folder / "generation_config.json"
        path.unlink(missing_ok=True)
        if in_generation != "no file":
            write_ids(path, kind, in_generation, {})
        tokenizer = HuggingFace(path=str(folder)).load().tokenizer
        assert tokenizer is not None
        made = tokenizer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                oracle = transformers.AutoModelForCausalLM.from_pretrained(folder)
            except Exception:
                continue  # transformers refuses it
        expected = getattr(oracle.generation_config, kind)
        case = f"config.json {in_config}, generation_config.json {in_generation}"
        if kind == "eos_token_id" and (expected is None or expected == []):
            assert made.eos == (2,), case  # the tokenizer's own
        elif kind == "eos_token_id":
            listed = [expected] if isinstance(expected, int) else expected
            assert made.eos == tuple(dict.fromkeys(listed)), case
        elif expected is not None:
            assert made.bos == expected, case
        compared += 1
    assert compared > 10


def test_both_ends_of_a_list_stop_a_text(stored, tmp_path):
    """A chat that ends a turn with another token than the one of tokenizer_config.json."""
    folder = changed(stored["llama"], tmp_path / "model", {"eos_token_id": [0, 2]})
    write_tokenizer(folder, eos="c")
    lm = gptk.load(folder, device="cpu")
    assert lm.tokenizer.eos == (0, 2)
    for end in (0, 2):
        forced = [f"forced-tokens:tokens=[1, {end}, 1]"]
        out = lm.generate([3, 4], processors=forced, max_new_tokens=5)
        assert (out.tokens, out.finish_reason) == ([1], "eos")


@pytest.mark.parametrize("wrong", ["2", 2.5, True, {"a": 1}, [0, "2"], [[0]], -1, 10**30])
def test_ids_of_another_type_are_named(wrong, stored, tmp_path):
    folder = changed(stored["llama"], tmp_path / "model", {"eos_token_id": wrong})
    write_tokenizer(folder, eos="c")
    made = HuggingFace(path=str(folder)).load().tokenizer
    assert made is not None
    with pytest.raises(gptk.TokenizerError, match=r"config.json: eos_token_id.* must be"):
        made()
