"""From a Hugging Face config.json to a GPTConfig, by family; see `_huggingface_fields`."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

import gptk
from gptk.plugins import shown
from gptk_plugins.loaders._heads import head_dim_of, period_of
from gptk_plugins.loaders._huggingface_fields import (
    ACTIVATIONS,
    GELUS,
    Config,
    LayerTypes,
    Llama,
    Made,
    Positive,
    RopeParameters,
    Rotary,
    Size,
    Window,
    activation,
    checked_layers,
    divided,
    experts,
    rope_fields,
    rope_of,
    window_of,
)
from gptk_plugins.loaders._rope_rules import Rope
from gptk_plugins.loaders._tensor_readers import naming


class _GPT2(Config):
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

    def config(self, raw: Mapping[str, Any]) -> Made:
        config = gptk.GPTConfig(
            vocab_size=self.vocab_size,
            context_length=self.n_positions,
            width=self.n_embd,
            n_layers=self.n_layer,
            n_heads=self.n_head,
            n_kv_heads=self.n_head,
            head_dim=head_dim_of(self.n_embd, self.n_head),
            mlp_width=self.n_inner or 4 * self.n_embd,
            norm_eps=self.layer_norm_epsilon,
            mlp=activation(GELUS, activation_function=self.activation_function),
            tied_head=self.tie_word_embeddings,
        )
        return config, {}


class _OPT(Config):
    max_position_embeddings: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    ffn_dim: Size
    activation_function: str = "relu"
    do_layer_norm_before: Literal[True] = True
    remove_final_layer_norm: Literal[False] = Field(False, alias="_remove_final_layer_norm")
    word_embed_proj_dim: Size | None = None
    enable_bias: bool = True
    layer_norm_elementwise_affine: Literal[True] = True
    tie_word_embeddings: bool = True

    def config(self, raw: Mapping[str, Any]) -> Made:
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            raise gptk.SourceError(
                f"word_embed_proj_dim is {self.word_embed_proj_dim}; only hidden_size, "
                f"{self.hidden_size}, is supported"
            )
        config = gptk.GPTConfig(
            vocab_size=self.vocab_size,
            context_length=self.max_position_embeddings,
            width=self.hidden_size,
            n_layers=self.num_hidden_layers,
            n_heads=self.num_attention_heads,
            n_kv_heads=self.num_attention_heads,
            head_dim=divided(self.hidden_size, self.num_attention_heads),
            mlp_width=self.ffn_dim,
            mlp=activation(ACTIVATIONS, activation_function=self.activation_function),
            mlp_bias=self.enable_bias,
            qkv_bias=self.enable_bias,
            out_bias=self.enable_bias,
            tied_head=self.tie_word_embeddings,
        )
        return config, {}


class _NeoX(Rotary):
    partial = 0.25

    head_dim: None = None
    hidden_act: str = "gelu"
    layer_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rope_theta: Positive = Field(10000.0, alias="rotary_emb_base")
    partial_rotary_factor: float | None = Field(None, alias="rotary_pct")

    def config(self, raw: Mapping[str, Any]) -> Made:
        config = gptk.GPTConfig(
            vocab_size=self.vocab_size,
            context_length=self.max_position_embeddings,
            width=self.hidden_size,
            n_layers=self.num_hidden_layers,
            n_heads=self.num_attention_heads,
            n_kv_heads=self.num_attention_heads,
            head_dim=divided(self.hidden_size, self.num_attention_heads),
            mlp_width=self.intermediate_size,
            norm_eps=self.layer_norm_eps,
            parallel=self.use_parallel_residual,
            positions="rotary",
            mlp=activation(ACTIVATIONS, hidden_act=self.hidden_act),
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            tied_head=self.tie_word_embeddings,
            **rope_fields(rope_of(self, raw), self.heads),
        )
        return config, {}


class _LlamaItself(Llama):
    attention_bias: bool = False
    mlp_bias: bool = False


class _Sliding(Llama):
    """Families whose layers all have the sliding window, if there is one."""

    sliding_window: Size | None = None
    layer_types: LayerTypes | None = None

    @property
    def window(self) -> Window:
        if self.sliding_window is not None and "full_attention" in (self.layer_types or ()):
            raise gptk.SourceError("layer_types has full_attention, though there is sliding_window")
        return self.sliding_window, ()


class _Mistral(_Sliding):
    num_key_value_heads: Size | None = 8
    sliding_window: Size | None = 4096


class _Mixtral(_Mistral):
    sliding_window: Size | None = None
    rope_theta: Positive = 1_000_000.0
    rms_norm_eps: Positive = 1e-5
    num_local_experts: Size = 8
    num_experts_per_tok: Size = 2

    def rope(self, raw: Mapping[str, Any]) -> Rope:
        rope = super().rope(raw)
        if rope.scale != 1 and self.head_dim is None:
            raise gptk.SourceError("rope_type is 'yarn', which needs head_dim")
        return rope

    @property
    def more(self) -> dict[str, Any]:
        return experts(self.num_local_experts, self.num_experts_per_tok)


class _Qwen2(Llama):
    bias_on_qkv = True

    num_key_value_heads: Size | None = 32
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: int = 28
    layer_types: LayerTypes | None = None

    @property
    def window(self) -> Window:
        window = self.sliding_window if self.use_sliding_window else None
        if self.layer_types is not None:
            return window_of(window, self.layer_types, self.num_hidden_layers)
        if window is None or self.max_window_layers >= self.num_hidden_layers:
            return None, ()
        layers = range(checked_layers(self.num_hidden_layers))
        return window, [layer >= self.max_window_layers for layer in layers]


class _Qwen3(_Qwen2):
    bias_on_qkv = False
    always: ClassVar[Mapping[str, Any]] = {"qk_norm": True}

    head_dim: Size = 128
    attention_bias: bool = False


class _Qwen3Moe(_Sliding):
    always: ClassVar[Mapping[str, Any]] = {"qk_norm": True}

    num_key_value_heads: Size | None = 4
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    decoder_sparse_step: Literal[1] = 1
    mlp_only_layers: list[int] | None = Field(None, max_length=0)
    moe_intermediate_size: Size = 768
    num_experts_per_tok: Size = 8
    num_local_experts: Size = 128
    norm_topk_prob: bool = False

    @property
    def window(self) -> Window:
        return super().window if self.use_sliding_window else (None, ())

    @property
    def more(self) -> dict[str, Any]:
        return {
            "mlp_width": self.moe_intermediate_size,
            "normalize_experts": self.norm_topk_prob,
            **experts(self.num_local_experts, self.num_experts_per_tok),
        }


class _Phi3(_Sliding):
    partial = 1.0
    rope_rules = ("default", "longrope")

    rms_norm_eps: Positive = 1e-5
    original_max_position_embeddings: Size = 4096
    partial_rotary_factor: float = 1.0


class _OLMo2(Llama):
    always: ClassVar[Mapping[str, Any]] = {"norms": "after", "qk_norm_joint": True}

    rms_norm_eps: Positive = 1e-5
    attention_bias: bool = False


class _SmolLM3(Llama):
    num_key_value_heads: Size | None = 4
    tie_word_embeddings: bool = True
    rope_theta: Positive = 2_000_000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Size | None = None
    no_rope_layers: list[Annotated[int, Field(ge=0, le=1)]] | None = None
    no_rope_layer_interval: Size = 4
    layer_types: LayerTypes | None = None

    @property
    def rotating(self) -> list[bool]:
        """Which layers rotate."""
        layers = checked_layers(self.num_hidden_layers)
        if self.no_rope_layers is None:
            return [bool((layer + 1) % self.no_rope_layer_interval) for layer in range(layers)]
        if len(self.no_rope_layers) < layers:
            raise gptk.SourceError(
                f"no_rope_layers names {len(self.no_rope_layers)} layers, and num_hidden_layers is "
                f"{layers}"
            )
        return [bool(rotates) for rotates in self.no_rope_layers[:layers]]

    @property
    def window(self) -> Window:
        window = self.sliding_window if self.use_sliding_window else None
        if self.layer_types is not None:
            return window_of(window, self.layer_types, self.num_hidden_layers)
        slides = [not rotates for rotates in self.rotating]
        return window if any(slides) else None, slides

    @property
    def more(self) -> dict[str, Any]:
        return {"rotary_layers": period_of(self.rotating)}


class _Gemma2(Llama):
    always: ClassVar[Mapping[str, Any]] = {"norms": "both", "mlp": "geglu-tanh"}

    vocab_size: Size = 256_000
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Size = 26
    num_attention_heads: Size = 8
    num_key_value_heads: Size | None = 4
    head_dim: Size = 256
    max_position_embeddings: Size = 8192
    hidden_act: Any = None
    """transformers reads hidden_activation."""
    hidden_activation: Literal["gelu_pytorch_tanh", "gelu_new", "gelu_fast"] = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: Size = 256
    sliding_window: Size = 4096
    layer_types: LayerTypes | None = None
    final_logit_softcapping: Positive | None = 30.0
    attn_logit_softcapping: Positive | None = 50.0
    use_bidirectional_attention: Literal[False] | None = None

    @property
    def pattern(self) -> int:
        """Every how manyth layer has no window, where the file does not say which layers have."""
        return 2

    @property
    def window(self) -> Window:
        types: list[Any] | None = self.layer_types
        if types is None:
            layers = range(checked_layers(self.num_hidden_layers))
            kinds = "full_attention", "sliding_attention"
            types = [kinds[bool((layer + 1) % self.pattern)] for layer in layers]
        return window_of(self.sliding_window, types, self.num_hidden_layers)

    @property
    def more(self) -> dict[str, Any]:
        usual = self.query_pre_attn_scalar == self.head_dim
        return {
            "embedding_scale": self.hidden_size**0.5,
            "attention_scale": None if usual else self.query_pre_attn_scalar**-0.5,
            "attention_softcap": self.attn_logit_softcapping,
            "logit_softcap": self.final_logit_softcapping,
        }


class _Gemma3(_Gemma2):
    always: ClassVar[Mapping[str, Any]] = {**_Gemma2.always, "qk_norm": True}

    vocab_size: Size = 262_208
    max_position_embeddings: Size = 131_072
    rope_theta: Positive = 1_000_000.0
    rope_local_base_freq: Positive = 10_000.0
    final_logit_softcapping: Positive | None = None
    attn_logit_softcapping: Any = None
    """transformers does not read it."""
    sliding_window_pattern: Size = 6

    @property
    def pattern(self) -> int:
        return self.sliding_window_pattern

    def rope(self, raw: Mapping[str, Any]) -> Rope:
        given = self.rope_parameters
        if self.rope_scaling is not None and given is not None and not given.get("full_attention"):
            raise gptk.SourceError("rope_scaling changes full_attention, which is not there")
        return rope_of(self, raw, {**self._parameters("full"), **(self.rope_scaling or {})})

    @property
    def more(self) -> dict[str, Any]:
        given, where = self._parameters("sliding"), "rope_parameters: sliding_attention"
        rope = RopeParameters.parse(given, where)
        if (kind := rope.kind_in(given)) != "default":
            raise gptk.SourceError(f"{where}: rope_type is {shown(kind)}; it must be 'default'")
        if rope.partial_rotary_factor != 1.0:
            raise gptk.SourceError(
                f"{where}: partial_rotary_factor is {rope.partial_rotary_factor}; it must be 1.0"
            )
        theta = rope.rope_theta if "rope_theta" in given else self.rope_local_base_freq
        own = {"attention_softcap": None, "window_rope_theta": theta if self.window[0] else None}
        return super().more | own

    def _parameters(self, kind: str) -> dict[str, Any]:
        """rope_parameters of full or sliding attention."""
        name = f"{kind}_attention"
        given = (self.rope_parameters or {}).get(name)
        if given is not None and not isinstance(given, dict):
            raise gptk.SourceError(f"rope_parameters: {name} is {shown(given)}")
        return given or {}


FAMILIES: dict[str, type[Config]] = {
    "gpt2": _GPT2,
    "llama": _LlamaItself,
    "mistral": _Mistral,
    "mixtral": _Mixtral,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "qwen3_moe": _Qwen3Moe,
    "phi3": _Phi3,
    "olmo2": _OLMo2,
    "smollm3": _SmolLM3,
    "gemma2": _Gemma2,
    "gemma3_text": _Gemma3,
    "gpt_neox": _NeoX,
    "opt": _OPT,
}
_EXPERTS = {"num_experts": "num_local_experts"}
_ALIASES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
"""Other names of fields. In transformers they win over the fields themselves."""


def is_known(raw: Mapping[str, Any]) -> bool:
    """Whether gptk has code for a configuration's family."""
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in FAMILIES


def read_config(raw: Mapping[str, Any], source: str) -> Made:
    """The configuration, and notes for `gptk info`. Raises SourceError for unsupported values."""
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or not isinstance(kind, str):
        more = ""
        if find_spec("transformers") is None:
            install = gptk.distribution.install_command("transformers")
            more = f", and what transformers can run if that is installed: {install}"
        raise gptk.SourceError(
            f"{source}: the model type {shown(kind)} is not supported; {', '.join(FAMILIES)} are"
            f"{more}"
        )
    aliases = _ALIASES.get(kind, {})
    raw = {**raw, **{name: raw[alias] for alias, name in aliases.items() if alias in raw}}
    fields = family.parse(raw, f"{source}/config.json")
    with naming(f"{source}/config.json"):
        return fields.config(raw)
