"""The names and layouts of tensors in Hugging Face checkpoints, by family."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import gptk
from gptk_plugins.loaders._heads import reorder_heads, rotated_apart

Change = Callable[[str, Tensor], Tensor]
"""Takes a tensor's name at Hugging Face and the tensor; returns it in gptk's layout."""

LLAMA_NAMES = {
    "embed": "embed_tokens",
    "blocks.{i}.attn_norm": "layers.{i}.input_layernorm",
    "blocks.{i}.attn.qkv": " ".join(f"layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    "blocks.{i}.attn.q_norm": "layers.{i}.self_attn.q_norm",
    "blocks.{i}.attn.k_norm": "layers.{i}.self_attn.k_norm",
    "blocks.{i}.attn.out": "layers.{i}.self_attn.o_proj",
    "blocks.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.up": "layers.{i}.mlp.gate_proj layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down": "layers.{i}.mlp.down_proj",
    "norm": "norm",
}
GPT2_NAMES = {
    "embed": "wte",
    "embed_positions": "wpe",
    "blocks.{i}.attn_norm": "h.{i}.ln_1",
    "blocks.{i}.attn.qkv": "h.{i}.attn.c_attn",
    "blocks.{i}.attn.out": "h.{i}.attn.c_proj",
    "blocks.{i}.mlp_norm": "h.{i}.ln_2",
    "blocks.{i}.mlp.up": "h.{i}.mlp.c_fc",
    "blocks.{i}.mlp.down": "h.{i}.mlp.c_proj",
    "norm": "ln_f",
}
_AFTER = {
    "blocks.{i}.attn_post_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp_post_norm": "layers.{i}.post_feedforward_layernorm",
}
_GEMMA = LLAMA_NAMES | _AFTER | {"blocks.{i}.mlp_norm": "layers.{i}.pre_feedforward_layernorm"}
_NEOX = {
    "embed": "embed_in",
    "blocks.{i}.attn_norm": "layers.{i}.input_layernorm",
    "blocks.{i}.attn.qkv": "layers.{i}.attention.query_key_value",
    "blocks.{i}.attn.out": "layers.{i}.attention.dense",
    "blocks.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.up": "layers.{i}.mlp.dense_h_to_4h",
    "blocks.{i}.mlp.down": "layers.{i}.mlp.dense_4h_to_h",
    "norm": "final_layer_norm",
}
_OPT = LLAMA_NAMES | {
    "embed_positions": "embed_positions",
    "blocks.{i}.attn_norm": "layers.{i}.self_attn_layer_norm",
    "blocks.{i}.attn.out": "layers.{i}.self_attn.out_proj",
    "blocks.{i}.mlp_norm": "layers.{i}.final_layer_norm",
    "blocks.{i}.mlp.up": "layers.{i}.fc1",
    "blocks.{i}.mlp.down": "layers.{i}.fc2",
    "norm": "final_layer_norm",
}


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Names of experts, after those of the block."""
    expert = f"{block}.experts.{{e}}"
    return LLAMA_NAMES | {
        "blocks.{i}.mlp.router": f"{block}.gate",
        "blocks.{i}.mlp.experts.{e}.up": f"{expert}.{gate} {expert}.{up}",
        "blocks.{i}.mlp.experts.{e}.down": f"{expert}.{down}",
    }


def _gpt2_change(_: gptk.GPTConfig) -> Change:
    """GPT-2's linear layers are stored (in, out), as 1x1 convolutions."""

    def change(name: str, tensor: Tensor) -> Tensor:
        is_linear = re.search(r"\.c_\w+\.weight$", name)
        return tensor.T.contiguous() if is_linear else tensor

    return change


def _gemma_change(_: gptk.GPTConfig) -> Change:
    """Gemma's norms multiply by 1 + weight."""

    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor.float() + 1 if name.endswith("norm.weight") else tensor

    return change


def _opt_change(_: gptk.GPTConfig) -> Change:
    """OPT's positions begin with 2."""

    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor[2:] if name.endswith("embed_positions.weight") else tensor

    return change


def _phi3_change(config: gptk.GPTConfig) -> Change | None:
    """The rotated numbers of each head of queries and keys, if these are not all."""
    if config.rotary_dim is None:
        return None
    rotated = rotated_apart(config.head_dim, config.rotary_dim)
    orders = rotated, rotated, torch.arange(config.head_dim)
    sizes = config.n_heads, config.n_kv_heads, config.n_kv_heads

    def change(name: str, tensor: Tensor) -> Tensor:
        if ".qkv_proj." not in name:
            return tensor
        return reorder_heads(tensor, orders, sizes, config.head_dim)  # type: ignore[return-value]

    return change


def _neox_change(config: gptk.GPTConfig) -> Change:
    """GPT-NeoX stores query, key and value of a head one after the other."""
    d, heads = config.head_dim, config.n_heads
    rotated = torch.arange(d) if config.rotary_dim is None else rotated_apart(d, config.rotary_dim)
    orders = rotated, rotated, torch.arange(d)

    def change(name: str, tensor: Tensor) -> Tensor:
        if ".query_key_value." not in name:
            return tensor
        parts = tensor.view(heads, 3, d, -1).transpose(0, 1).reshape(tensor.shape)
        return reorder_heads(parts, orders, (heads,) * 3, d)  # type: ignore[return-value]

    return change


@dataclass(frozen=True)
class Layout:
    """How a family stores its tensors."""

    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    """From gptk's names to those at Hugging Face, see `gptk.Tensors.assemble`."""
    prefixes: tuple[str, ...] = ("model.",)
    """What names begin with: the first that a file has, or nothing."""
    head: str = "lm_head"
    change: Callable[[gptk.GPTConfig], Change | None] | None = None

    def names_in(self, tensors: gptk.Tensors) -> dict[str, str]:
        """The names, with the prefix that a file has."""
        prefix = next((p for p in self.prefixes if any(x.startswith(p) for x in tensors)), "")
        names = {
            ours: " ".join(prefix + name for name in theirs.split())
            for ours, theirs in self.names.items()
        }
        return names | {"head": self.head}


LAYOUTS = {
    "gpt2": Layout(GPT2_NAMES, ("transformer.",), change=_gpt2_change),
    "llama": Layout(),
    "mistral": Layout(),
    "mixtral": Layout(_experts("layers.{i}.block_sparse_moe", "w1", "w3", "w2")),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "qwen3_moe": Layout(_experts("layers.{i}.mlp", "gate_proj", "up_proj", "down_proj")),
    "phi3": Layout(
        LLAMA_NAMES
        | {
            "blocks.{i}.attn.qkv": "layers.{i}.self_attn.qkv_proj",
            "blocks.{i}.mlp.up": "layers.{i}.mlp.gate_up_proj",
        },
        change=_phi3_change,
    ),
    "olmo2": Layout(LLAMA_NAMES | _AFTER),
    "smollm3": Layout(),
    "gemma2": Layout(_GEMMA, change=_gemma_change),
    "gemma3_text": Layout(_GEMMA, change=_gemma_change),
    "gpt_neox": Layout(_NEOX, ("gpt_neox.",), "embed_out", _neox_change),
    "opt": Layout(_OPT, ("model.decoder.", "decoder."), change=_opt_change),
}
