"""Small random models of transformers', of architectures that gptk has no code for."""

from typing import Any

import torch

_SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_LLAMA = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
_WINDOWS = {"sliding_window": 6, "head_dim": 32}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cohere": {**_LLAMA, "logit_scale": 0.25},
    "deepseek_v3": {
        **_LLAMA,
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 20,
        "num_key_value_heads": 4,
    },
    "exaone4": {**_LLAMA, "sliding_window": 6},
    "gemma": {**_LLAMA, "head_dim": 32},
    "gemma2": {**_LLAMA, **_WINDOWS, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_LLAMA, **_WINDOWS, "query_pre_attn_scalar": 20},
    "glm4": {**_LLAMA, "head_dim": 16},
    "gpt_bigcode": {
        "vocab_size": 257,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 96,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "gpt_neox": {**_SIZES, "intermediate_size": 96, "rotary_pct": 0.25},
    "gpt_oss": {**_LLAMA, **_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {**_LLAMA, "attention_multiplier": 0.3, "logits_scaling": 4.0},
    "llama4_text": {
        **_LLAMA,
        "head_dim": 32,
        "num_local_experts": 2,
        "attention_chunk_size": 6,
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
    },
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "nemotron": {**_LLAMA},
    "olmo2": {**_LLAMA},
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {**_SIZES, "intermediate_size": 96},
    "phi": {**_LLAMA},
    "phi3": {**_LLAMA, "sliding_window": 7},
    "qwen2_moe": {
        **_LLAMA,
        **_EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
    },
    "smollm3": {**_LLAMA},
    "starcoder2": {**_LLAMA, "sliding_window": 8},
}
"""The configuration of each model type. Windows, soft caps and chunks are so small that a few
tokens reach them."""


def small_model(kind: str, *, seed: int = 0, scale: float = 0.15, noise: float = 0) -> Any:
    """A random model of transformers', whose logits are far from equal, in evaluation mode.

    noise: added to the weights, for a model that is a little different.
    """
    import transformers

    config = transformers.AutoConfig.for_model(kind, **ARCHITECTURES[kind])
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
        for weight in model.parameters() if noise else ():
            weight += noise * torch.randn(weight.shape, generator=generator)
    return model.eval()
