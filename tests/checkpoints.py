"""Random models of transformers, and GGUF files of them, written with the package gguf."""

from collections.abc import Callable
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
}


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
        if parameter.dim() == 2:
            conv1d = name.split(".")[-2].startswith("c_")
            matrix = (parameter.T if conv1d else parameter).contiguous().numpy()
            array = gguf.quants.dequantize(gguf.quants.quantize(matrix, stored), stored)
            rounded = torch.from_numpy(array.copy())
            parameter.copy_(rounded.T if conv1d else rounded)


def write_gguf(path: Path, model: Any, kind: str | Callable[[str], str] = "F32") -> None:
    """A GGUF file of a transformers model, laid out as llama.cpp's converter does.

    kind: of the matrices, or a function of their names in the file. Those whose kind the package
    gguf cannot make are random ones.
    """
    config = model.config
    architecture: str = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    writer.add_block_count(n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(n_heads)
    n_kv_heads = n_heads
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        n_kv_heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(n_kv_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "llama3":
            plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
            stretched = model.model.rotary_emb.inv_freq
            writer.add_tensor("rope_freqs.weight", (plain / stretched).numpy())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(chr(33 + i) for i in range(VOCABULARY - 1)), "!!"])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["! !"])
    names = gguf.get_tensor_name_map(
        {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], n_layers
    )
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if architecture == "gpt2" and name.split(".")[-2].startswith("c_"):
            array = array.T
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = n_heads if ".q_proj." in name else n_kv_heads
            halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        array = np.ascontiguousarray(array)
        chosen = kind if isinstance(kind, str) else kind(gguf_name)
        stored = gguf.GGMLQuantizationType[chosen if array.ndim == 2 else "F32"]
        try:
            data = gguf.quants.quantize(array, stored)
        except NotImplementedError:
            data = small_rows(chosen, (array.shape[0], array.shape[1]), seed=len(gguf_name))
        writer.add_tensor(gguf_name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
