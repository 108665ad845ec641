"""A Hugging Face directory: config.json, model.safetensors and a tokenizer, for transformers.

The family is the simplest that can hold the configuration: gpt2, llama, mistral (a sliding window),
qwen2 (biases on queries, keys and values only) or qwen3 (a norm on each head). Biases that the
family always has and the model lacks are written as zeros, which changes no prediction.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import gptk
from gptk_plugins.loaders._huggingface_config import read_config
from gptk_plugins.loaders._huggingface_tensors import GPT2_NAMES, LLAMA_NAMES
from gptk_plugins.writers._tokenizer_json import write_json, write_tokenizer

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ATTENTION = ("blocks.{i}.attn.qkv", "blocks.{i}.attn.out")


class HuggingFace(gptk.WeightWriter):
    """config.json, model.safetensors and tokenizer.json, as transformers reads them."""

    name = "huggingface"

    def write(self, path: Path, model: gptk.GPT, tokenizer: gptk.Tokenizer | None) -> None:
        raw = config_json(model.config)
        raw["torch_dtype"] = str(model.dtype).removeprefix("torch.")
        eos = list(tokenizer.eos) if tokenizer else []
        tokens = {
            "bos_token_id": tokenizer.bos if tokenizer else None,
            "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        }
        write_json(path / "config.json", raw | tokens)
        write_json(path / "generation_config.json", tokens)
        if tokenizer is not None:
            write_tokenizer(path, tokenizer, model.config.context_length)
        save_file(dict(_tensors(model, raw)), path / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; use the other files' mode.
        (path / "model.safetensors").chmod((path / "config.json").stat().st_mode)


_UNWRITTEN = (
    *("norms", "parallel", "embedding_scale", "rotary_dim", "rope_scale", "rotary_layers"),
    *("window_layers", "window_rope_theta", "attention_scale", "attention_softcap"),
    *("logit_softcap", "n_experts", "qk_norm_joint"),
)
"""Fields of configurations that are written only as they are by default."""


def config_json(config: gptk.GPTConfig) -> dict[str, Any]:
    """config.json for a configuration. Raises SourceError if no family can hold it."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in _UNWRITTEN:
        if (value := getattr(config, name)) != defaults[name]:
            raise gptk.SourceError(
                f"the format huggingface cannot hold this model yet: its {name} is {value}"
            )
    kind = (config.norm, config.positions, config.mlp)
    has_gelu = config.mlp in ("gelu", "gelu-tanh")
    if config.norm == "layer" and config.positions == "learned" and has_gelu:
        family, raw = "gpt2", _gpt2(config)
    elif kind == ("rms", "rotary", "swiglu"):
        family, raw = _llama(config)
    else:
        raise gptk.SourceError(
            f"no family of Hugging Face's that gptk writes has {config.norm} norm, "
            f"{config.positions} positions and {config.mlp}; gpt2 has layer norm, learned "
            "positions and a GELU, the llamas have rms norm, rotary positions and swiglu"
        )
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        **raw,
        "tie_word_embeddings": config.tied_head,
    }


def _gpt2(config: gptk.GPTConfig) -> dict[str, Any]:
    for what, fits in (
        ("a norm on each head", not config.qk_norm),
        ("a sliding window", config.window is None),
        ("grouped heads", config.n_kv_heads == config.n_heads),
        ("heads that do not make up its width", config.head_dim * config.n_heads == config.width),
    ):
        if not fits:
            raise gptk.SourceError(f"Hugging Face's gpt2 cannot hold this model: it has {what}")
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu" if config.mlp == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
    }


def _llama(config: gptk.GPTConfig) -> tuple[str, dict[str, Any]]:
    raw: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # At the top level, where transformers 4 reads it, too.
        "rope_theta": config.rope_theta,
    }
    raw["rope_scaling"] = _rope_scaling(config.rope_factors, raw)
    attention_bias = config.qkv_bias or config.out_bias
    if config.window is not None:
        if config.qk_norm or attention_bias or config.mlp_bias:
            raise gptk.SourceError(
                "Hugging Face's mistral cannot hold this model: beside its sliding window it has "
                "biases or a norm on each head"
            )
        return "mistral", raw | {"sliding_window": config.window}
    if config.qk_norm:
        if config.mlp_bias:
            raise gptk.SourceError(
                "Hugging Face's qwen3 cannot hold this model: it has biases in its MLPs"
            )
        return "qwen3", raw | {"attention_bias": attention_bias}
    heads_fill_width = config.head_dim * config.n_heads == config.width
    if config.qkv_bias and heads_fill_width and not config.out_bias and not config.mlp_bias:
        return "qwen2", raw
    return "llama", raw | {"attention_bias": attention_bias, "mlp_bias": config.mlp_bias}


def _rope_scaling(
    factors: tuple[float, ...] | None, raw: Mapping[str, Any]
) -> dict[str, Any] | None:
    """rope_scaling for the divisors of the rotary frequencies: linear, or Llama 3.1's rule."""
    if factors is None:
        return None
    if min(factors) == max(factors):
        return {"rope_type": "linear", "factor": factors[0]}
    for exponent in range(4, 24):
        rule = {
            "rope_type": "llama3",
            "factor": max(factors),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2**exponent,
        }
        config = read_config({"model_type": "llama", **raw, "rope_scaling": rule}, "")[0]
        pairs = zip(factors, config.rope_factors or (), strict=True)
        if all(math.isclose(*pair, rel_tol=1e-5) for pair in pairs):
            return rule
    raise gptk.SourceError(
        "the rotary frequencies of this model are divided by neither one factor nor Llama 3.1's "
        "rule; no config.json that gptk reads can hold them"
    )


def _tensors(model: gptk.GPT, raw: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights by their names at Hugging Face."""
    config, state = model.config, model.state_dict()
    if config.tied_head:
        del state["head.weight"]
    for pattern in _always_biased(raw):
        for layer in range(config.n_layers if "{i}" in pattern else 1):
            module = pattern.replace("{i}", str(layer))
            weight = state[f"{module}.weight"]
            state.setdefault(f"{module}.bias", torch.zeros(len(weight), dtype=weight.dtype))
    gpt2 = raw["model_type"] == "gpt2"
    names, prefix = (GPT2_NAMES, "transformer.") if gpt2 else (LLAMA_NAMES, "model.")
    names = {
        ours: " ".join(prefix + name for name in theirs.split()) for ours, theirs in names.items()
    }
    names["head"] = "lm_head"
    qkv_widths = [
        heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    ]
    for ours, tensor in state.items():
        module, _, parameter = ours.rpartition(".")
        number = re.search(r"\d+", module)
        theirs = names[re.sub(r"\d+", "{i}", module)].replace("{i}", number[0] if number else "")
        split = theirs.split()
        parts = tensor.split(qkv_widths) if len(split) == 3 else tensor.chunk(len(split))
        for name, part in zip(split, parts, strict=True):
            # GPT-2's linear layers are stored (in, out), as 1x1 convolutions.
            transposed = part.T if gpt2 and ".c_" in name and part.dim() == 2 else part
            yield f"{name}.{parameter}", transposed.contiguous()


def _always_biased(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that always have a bias in the family, as patterns of gptk's names."""
    if raw["model_type"] == "gpt2":
        return tuple(name for name in GPT2_NAMES if not name.startswith("embed"))
    return _ATTENTION if raw.get("attention_bias") else ()
