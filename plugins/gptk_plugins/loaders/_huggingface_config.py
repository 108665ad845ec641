"""From a Hugging Face config.json to a GPTConfig: every field that changes the model's output is
honored as transformers 5 does, or refused.

A field that the family's class in transformers does not read changes nothing there, and is ignored
here, too.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

import gptk
from gptk.plugins import Fields, shown
from gptk_plugins.loaders._heads import check_head_dim, head_dim_of
from gptk_plugins.loaders._tensor_readers import naming

_GELUS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu": "gelu",
}
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]


class _Config(Fields):
    """Fields of all families, with the only value that is supported."""

    quantization_config: None = None
    per_layer_config: None = None
    is_causal: Literal[True] | None = None
    """transformers reads None as true."""
    vocab_size: Size


class _GPT2(_Config):
    n_positions: Size
    n_embd: Size
    n_layer: Size
    n_head: Size
    n_inner: Size | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Positive = 1e-5
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True


class _Llama(_Config):
    """What Llama and the families after it share; defaults are those of their classes."""

    bias_on_qkv: ClassVar[bool] = False
    """Whether queries, keys and values always have biases."""
    head_norm: ClassVar[bool] = False

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: Positive = 10000.0
    partial_rotary_factor: float | None = None

    @property
    def heads(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int | None:
        """The sliding window of the layers that have one, or None if no layer does."""
        return None


class _LlamaItself(_Llama):
    attention_bias: bool = False
    mlp_bias: bool = False


class _Mistral(_Llama):
    num_key_value_heads: Size | None = 8
    sliding_window: Size | None = 4096

    @property
    def window(self) -> int | None:
        return self.sliding_window


class _Qwen2(_Llama):
    bias_on_qkv = True

    num_key_value_heads: Size | None = 32
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    @property
    def window(self) -> int | None:
        window = self.sliding_window if self.use_sliding_window else None
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise gptk.SourceError(
                    f"layer_types names {len(self.layer_types)} layers, and num_hidden_layers is "
                    f"{self.num_hidden_layers}"
                )
            slides = "sliding_attention" in self.layer_types
            if slides and window is None:
                raise gptk.SourceError(
                    "layer_types has sliding_attention, and use_sliding_window or sliding_window "
                    "says that there is none"
                )
        else:
            slides = self.max_window_layers < self.num_hidden_layers
        return window if slides else None


class _Qwen3(_Qwen2):
    bias_on_qkv = False
    head_norm = True

    head_dim: Size = 128
    attention_bias: bool = False


_FAMILIES: dict[str, type[_GPT2 | _Llama]] = {
    "gpt2": _GPT2,
    "llama": _LlamaItself,
    "mistral": _Mistral,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
}
_GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names of GPT-2's fields. In transformers they win over the fields themselves."""


def read_config(raw: Mapping[str, Any], source: str) -> tuple[gptk.GPTConfig, dict[str, str]]:
    """The configuration, and notes for `gptk info`. Raises SourceError for unsupported values."""
    kind = raw.get("model_type")
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise gptk.SourceError(
            f"{source}: the model type {shown(kind)} is not supported; {', '.join(_FAMILIES)} are"
        )
    if family is _GPT2:
        raw = {**raw, **{name: raw[alias] for alias, name in _GPT2_ALIASES.items() if alias in raw}}
    fields = family.parse(raw, f"{source}/config.json")
    with naming(f"{source}/config.json"):
        return (_gpt2(fields), {}) if isinstance(fields, _GPT2) else _llama(fields, raw)


def _gpt2(fields: _GPT2) -> gptk.GPTConfig:
    if fields.activation_function not in _GELUS:
        raise gptk.SourceError(
            f"activation_function {shown(fields.activation_function)} is not supported; "
            f"{', '.join(_GELUS)} are"
        )
    return gptk.GPTConfig(
        vocab_size=fields.vocab_size,
        context_length=fields.n_positions,
        width=fields.n_embd,
        n_layers=fields.n_layer,
        n_heads=fields.n_head,
        n_kv_heads=fields.n_head,
        head_dim=head_dim_of(fields.n_embd, fields.n_head),
        mlp_width=fields.n_inner or 4 * fields.n_embd,
        norm_eps=fields.layer_norm_epsilon,
        mlp=_GELUS[fields.activation_function],  # type: ignore[arg-type]
        tied_head=fields.tie_word_embeddings,
    )


def _llama(fields: _Llama, raw: Mapping[str, Any]) -> tuple[gptk.GPTConfig, dict[str, str]]:
    notes = {}
    context, window = fields.max_position_embeddings, fields.window
    if window is not None and window < context:
        # Within the length of the sliding window, it has no effect on attention.
        notes["context"] = f"{window}, limited from {context} by a sliding window"
        context = window
    theta, factors = _rope(fields, raw)
    attention_bias = getattr(fields, "attention_bias", False)
    config = gptk.GPTConfig(
        vocab_size=fields.vocab_size,
        context_length=context,
        width=fields.hidden_size,
        n_layers=fields.num_hidden_layers,
        n_heads=fields.num_attention_heads,
        n_kv_heads=fields.num_key_value_heads or fields.num_attention_heads,
        head_dim=fields.heads,
        mlp_width=fields.intermediate_size,
        norm="rms",
        norm_eps=fields.rms_norm_eps,
        positions="rotary",
        rope_theta=theta,
        rope_factors=factors,
        mlp="swiglu",
        mlp_bias=getattr(fields, "mlp_bias", False),
        qkv_bias=attention_bias or fields.bias_on_qkv,
        out_bias=attention_bias,
        qk_norm=fields.head_norm,
        tied_head=fields.tie_word_embeddings,
    )
    return config, notes


# --- Rotary positions ------------------------------------------------------------------------


class _Rope(Fields):
    """rope_scaling, or else rope_parameters."""

    rope_type: str = "default"
    type: str = "default"
    rope_theta: Positive = 10000.0
    partial_rotary_factor: float = 1.0
    full_attention: None = None
    sliding_attention: None = None


class _Linear(Fields):
    factor: Positive


class _Llama3(Fields):
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size


def _rope(fields: _Llama, raw: Mapping[str, Any]) -> tuple[float, tuple[float, ...] | None]:
    """The base of the rotary frequencies, and their divisors if the context was extended."""
    where = "rope_scaling" if fields.rope_scaling else "rope_parameters"
    given = fields.rope_scaling or fields.rope_parameters or {}
    rope = _Rope.parse(given, where)
    partial = rope.partial_rotary_factor
    if "partial_rotary_factor" not in given and fields.partial_rotary_factor is not None:
        partial = fields.partial_rotary_factor
    if partial != 1.0:
        raise gptk.SourceError(f"partial_rotary_factor is {partial}; it must be 1.0")
    theta = rope.rope_theta if "rope_theta" in given else fields.rope_theta
    kind = rope.rope_type if "rope_type" in given else rope.type
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise gptk.SourceError(
            f"{where}: rope_type is {shown(kind)}; default, linear and llama3 are supported"
        )
    check_head_dim(fields.heads)
    if kind == "linear":
        return theta, (_Linear.parse(given, where).factor,) * (fields.heads // 2)
    # The original context is looked for beside the rule, too, and there it counts more.
    original = "original_max_position_embeddings"
    context = raw.get(original, given.get(original, fields.max_position_embeddings))
    rule = _Llama3.parse({**given, original: context}, where)
    return theta, _llama3_divisors(rule, theta, fields.heads)


def _llama3_divisors(rule: _Llama3, theta: float, head_dim: int) -> tuple[float, ...]:
    """Llama 3.1's rule: frequencies whose wavelength is long relative to the original context are
    divided by factor, short ones are kept, with a linear transition in original / wavelength."""
    low, high = rule.low_freq_factor, rule.high_freq_factor
    if low >= high:
        raise gptk.SourceError(f"high_freq_factor, {high}, must be above low_freq_factor, {low}")
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        position = rule.original_max_position_embeddings / wavelength
        kept = min(1.0, max(0.0, (position - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / rule.factor))
    return tuple(divisors)
