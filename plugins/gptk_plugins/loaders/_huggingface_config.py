"""From a Hugging Face config.json to a GPTConfig: every field that changes the model's output is
supported or refused."""

import math
from collections.abc import Mapping
from typing import Any

import gptk

# For a field that config.json lacks, transformers takes the default of the configuration's class.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_GELUS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu": "gelu",
}


def read_config(raw: Mapping[str, Any], source: str) -> tuple[gptk.GPTConfig, dict[str, str]]:
    """The configuration, and notes for `gptk info`. Raises SourceError for unsupported values."""
    model_type = raw.get("model_type")
    if model_type not in _DEFAULTS:
        raise gptk.SourceError(
            f"{source}: the model type {model_type!r} is not supported; {', '.join(_DEFAULTS)} are"
        )
    raw = {**_DEFAULTS[model_type], **raw}
    try:
        _require(raw, "quantization_config", None)
        if model_type == "gpt2":
            return _gpt2(raw), {}
        return _llama(raw, model_type)
    except KeyError as error:
        raise gptk.SourceError(f"{source}: config.json has no {error.args[0]}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise gptk.SourceError(f"{source}: config.json holds a wrong value: {error}") from None
    except gptk.SourceError as error:
        raise gptk.SourceError(f"{source}: {error}") from None


def _gpt2(raw: Mapping[str, Any]) -> gptk.GPTConfig:
    _require(raw, "scale_attn_weights", True)
    _require(raw, "scale_attn_by_inverse_layer_idx", False)
    _require(raw, "add_cross_attention", False)
    width, n_heads = raw["n_embd"], raw["n_head"]
    activation = raw.get("activation_function", "gelu_new")
    return gptk.GPTConfig(
        vocab_size=raw["vocab_size"],
        context_length=raw["n_positions"],
        width=width,
        n_layers=raw["n_layer"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=width // n_heads,
        mlp_width=raw.get("n_inner") or 4 * width,
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        mlp=_translated("activation_function", activation, _GELUS),
        tied_head=raw.get("tie_word_embeddings", True),
    )


def _llama(raw: Mapping[str, Any], model_type: str) -> tuple[gptk.GPTConfig, dict[str, str]]:
    _translated("hidden_act", raw.get("hidden_act", "silu"), {"silu": "silu", "swish": "silu"})
    notes = {}
    context = raw["max_position_embeddings"]
    window = _sliding_window(raw, model_type)
    if window is not None and window < context:
        # Within the length of the sliding window, it has no effect on attention.
        notes["context"] = f"{window}, limited from {context} by a sliding window"
        context = window
    width, n_heads = raw["hidden_size"], raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or width // n_heads
    attention_bias = model_type in ("llama", "qwen3") and raw.get("attention_bias", False)
    theta, factors = _rope(raw, head_dim)
    config = gptk.GPTConfig(
        vocab_size=raw["vocab_size"],
        context_length=context,
        width=width,
        n_layers=raw["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=raw.get("num_key_value_heads") or n_heads,
        head_dim=head_dim,
        mlp_width=raw["intermediate_size"],
        norm="rms",
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        positions="rotary",
        rope_theta=theta,
        rope_factors=factors,
        mlp="swiglu",
        mlp_bias=model_type == "llama" and raw.get("mlp_bias", False),
        qkv_bias=attention_bias or model_type == "qwen2",
        out_bias=attention_bias,
        qk_norm=model_type == "qwen3",
        tied_head=raw.get("tie_word_embeddings", False),
    )
    return config, notes


def _sliding_window(raw: Mapping[str, Any], model_type: str) -> int | None:
    """The sliding window of the layers that have one, or None if no layer does."""
    window: int | None = raw.get("sliding_window")
    if model_type == "mistral":
        return window
    if model_type == "llama" or not raw.get("use_sliding_window", False):
        return None
    layers = raw.get("layer_types")
    if layers is None:
        return window if raw.get("max_window_layers", 28) < raw["num_hidden_layers"] else None
    return window if "sliding_attention" in layers else None


def _rope(raw: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[float, ...] | None]:
    """The base of the rotary frequencies, and their divisors if the context was extended."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    for fields in (raw, rope):
        _require(fields, "partial_rotary_factor", 1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    pairs = head_dim // 2
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, (float(rope["factor"]),) * pairs
    if kind != "llama3":
        raise gptk.SourceError(
            f"rotary scaling {kind!r} is not supported; default, linear and llama3 are"
        )
    # Llama 3.1: frequencies whose wavelength is long relative to the original context are divided
    # by factor, short ones are kept, with a linear transition in original / wavelength.
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    divisors = []
    for pair in range(pairs):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        kept = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / factor))
    return theta, tuple(divisors)


def _require(raw: Mapping[str, Any], key: str, supported: Any) -> None:
    """Raises SourceError if the field is present with another value than `supported`."""
    value = raw.get(key)
    if value is not None and value != supported:
        allowed = "is not supported" if supported is None else f"must be {supported}"
        raise gptk.SourceError(f"{key} in config.json is {value!r}; it {allowed}")


def _translated(key: str, value: Any, known: Mapping[str, str]) -> Any:
    if value not in known:
        raise gptk.SourceError(f"{key} {value!r} is not supported; {', '.join(known)} are")
    return known[value]
