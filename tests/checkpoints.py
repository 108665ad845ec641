"""Random models of transformers, and GGUF files of them, written with the package gguf."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from stored_blocks import small_rows

VOCABULARY = 97

_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 1024,  # all that transformers reads of GPT-2 in GGUF files
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_PAD: Any = {"pad_token_id": 0}
_GEMMA = _LLAMA | {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 11}
_EXPERTS: dict[str, Any] = {
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
}
_NEOX: dict[str, Any] = {name: _LLAMA[name] for name in _LLAMA if name != "num_key_value_heads"}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

CONFIGS = {
    "gpt2": transformers.GPT2Config(**_GPT2),
    "gpt2-untied-gelu": transformers.GPT2Config(
        **_GPT2,
        n_inner=96,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=False,
    ),
    "llama": transformers.LlamaConfig(**_LLAMA, rms_norm_eps=1e-3),
    "llama-biases-tied": transformers.LlamaConfig(
        **_LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-llama3-rope": transformers.LlamaConfig(**_LLAMA, rope_parameters=_LLAMA3_ROPE),
    "llama-linear-rope": transformers.LlamaConfig(
        **_LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    ),
    "mistral": transformers.MistralConfig(**_LLAMA, head_dim=32, sliding_window=None),
    "mistral-window": transformers.MistralConfig(**_LLAMA, sliding_window=48),
    "qwen2": transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen2-untied": transformers.Qwen2Config(**_LLAMA),
    "qwen3": transformers.Qwen3Config(**_LLAMA, head_dim=128, tie_word_embeddings=True),
    "qwen3-biases": transformers.Qwen3Config(**_LLAMA, head_dim=16, attention_bias=True),
    "qwen2-windows": transformers.Qwen2Config(
        **_LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "mistral-yarn": transformers.MistralConfig(
        **_LLAMA, sliding_window=7, rope_parameters=_YARN
    ),
    "llama-yarn-mscale": transformers.LlamaConfig(
        **_LLAMA,
        rope_parameters={
            **_YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 8.0, "truncate": False
        },
    ),
    "gemma2": transformers.Gemma2Config(
        **_GEMMA, query_pre_attn_scalar=24, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **_GEMMA | {"num_hidden_layers": 7}, query_pre_attn_scalar=16
    ),
    "gemma3-scaled": transformers.Gemma3TextConfig(
        **_GEMMA,
        query_pre_attn_scalar=24,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        final_logit_softcapping=4.0,
    ),
    "gemma3-sixth": transformers.Gemma3TextConfig(
        **_GEMMA | {"num_hidden_layers": 7, "sliding_window": 20},
        query_pre_attn_scalar=16,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma2-usual": transformers.Gemma2Config(
        **_GEMMA, query_pre_attn_scalar=16, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "phi3": transformers.Phi3Config(**_LLAMA, **_PAD),
    "phi3-longrope": transformers.Phi3Config(
        **_LLAMA | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
        **_PAD,
        original_max_position_embeddings=64,
        tie_word_embeddings=True,
        sliding_window=9,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        },
    ),
    "olmo2": transformers.Olmo2Config(**_LLAMA, **_PAD),
    "smollm3": transformers.SmolLM3Config(**_LLAMA | {"num_hidden_layers": 5}, **_PAD),
    "smollm3-windows": transformers.SmolLM3Config(
        **_LLAMA | {"num_hidden_layers": 3}, **_PAD, mlp_bias=True,
        use_sliding_window=True, sliding_window=6, no_rope_layers=[1, 0, 0, 1],
    ),
    "mixtral": transformers.MixtralConfig(**_LLAMA, num_local_experts=5, sliding_window=9),
    "mixtral-full": transformers.MixtralConfig(**_LLAMA, num_local_experts=5),
    "llama-yarn": transformers.LlamaConfig(**_LLAMA, rope_parameters=_YARN),
    "qwen3-moe": transformers.Qwen3MoeConfig(**_LLAMA, **_EXPERTS, norm_topk_prob=True),
    "qwen3-moe-unnormalized": transformers.Qwen3MoeConfig(**_LLAMA, **_EXPERTS),
    "gpt-neox": transformers.GPTNeoXConfig(**_NEOX | {"rotary_pct": 0.5}),
    "gpt-neox-sequential": transformers.GPTNeoXConfig(
        **_NEOX, use_parallel_residual=False, hidden_act="gelu_new", attention_bias=False,
        layer_norm_eps=1e-3, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "linear", "rope_theta": 500.0, "factor": 3.0,
            "partial_rotary_factor": 0.25,
        },
    ),
    "opt": transformers.OPTConfig(**_OPT),
    "opt-untied-gelu": transformers.OPTConfig(
        **_OPT, activation_function="gelu", enable_bias=False, tie_word_embeddings=False
    ),
}  # fmt: skip


def random_model(case: str) -> Any:
    """A transformers model with weights large enough for its predictions to differ."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[case])
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.15)
    return model


def random_ids(length: int = 40, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (2, length), generator=generator)


@torch.no_grad()
def round_weights(model: nn.Module, kind: str) -> None:
    """Give the model's matrices the values they have after being stored as that type."""
    stored = gguf.GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            array = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), stored), stored)
            parameter.copy_(torch.from_numpy(array.copy()))
        elif parameter.dim() == 2:
            conv1d = name.split(".")[-2].startswith("c_")
            matrix = (parameter.T if conv1d else parameter).contiguous().numpy()
            array = gguf.quants.dequantize(gguf.quants.quantize(matrix, stored), stored)
            rounded = torch.from_numpy(array.copy())
            parameter.copy_(rounded.T if conv1d else rounded)


_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "qwen3_moe": "qwen3moe",
}
_PERMUTED = ("llama", "smollm3")
"""Architectures whose rotary pairs are adjacent in llama.cpp."""


def write_gguf(
    path: Path, model: Any, kind: str | Callable[[str], str] = "F32", split_max_tensors: int = 0
) -> None:
    """A GGUF file of a transformers model, laid out as llama.cpp's converter does.

    kind: of the matrices, or a function of their names in the file. Those whose kind the package
    gguf cannot make are random ones.
    split_max_tensors: how many tensors each of several parts has, NAME-00001-of-00002.gguf and so
    on; 0: one file.
    """
    config = model.config
    architecture: str = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    _write_metadata(writer, architecture, config)
    if getattr(config, "rope_parameters", {}).get("rope_type") == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
        stretched = model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", (plain / stretched).numpy())
    names = gguf.get_tensor_name_map(
        {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture],
        config.num_hidden_layers,
    )
    for name, array in _arrays(architecture, model):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        array = np.ascontiguousarray(array)
        chosen = kind if isinstance(kind, str) else kind(gguf_name)
        stored = gguf.GGMLQuantizationType[chosen if array.ndim >= 2 else "F32"]
        try:
            data = gguf.quants.quantize(array, stored)
        except NotImplementedError:
            data = small_rows(chosen, (array.shape[0], array.shape[1]), seed=len(gguf_name))
        writer.add_tensor(gguf_name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    n_heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(n_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        _write_rope(writer, architecture, config)
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
    elif architecture != "gpt2":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if getattr(config, "sliding_window", None) and architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(chr(33 + i) for i in range(VOCABULARY - 1)), "!!"])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["! !"])


def _write_rope(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    rope, heads = config.rope_parameters, config.num_attention_heads
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if not architecture.startswith("gemma"):
        writer.add_rope_dimension_count(rotary_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for name in ("long", "short"):
            factors = np.array(rope[f"{name}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)


def _arrays(architecture: str, model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters by their names in transformers, or, if these map to none, in GGUF."""
    config = model.config
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if architecture == "gpt2" and name.split(".")[-2].startswith("c_"):
            array = array.T
        if architecture in _PERMUTED and (".q_proj." in name or ".k_proj." in name):
            is_query = ".q_proj." in name
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if architecture == "gptneox" and ".query_key_value." in name:
            heads = config.num_attention_heads
            each = array.reshape(heads, 3, len(array) // heads // 3, -1)
            array = each.swapaxes(0, 1).reshape(array.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        block = ".".join(("blk", name.split(".")[2])) if ".layers." in name else ""
        if name.endswith(".mlp.experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            yield f"{block}.ffn_gate_exps.weight", gate
            yield f"{block}.ffn_up_exps.weight", up
        elif name.endswith(".mlp.experts.down_proj"):
            yield f"{block}.ffn_down_exps.weight", array
        elif name.endswith(".mlp.gate.weight"):
            yield f"{block}.ffn_gate_inp.weight", array
        else:
            yield name, array
