"""From the metadata of a GGUF file to a GPTConfig, by architecture, as llama.cpp reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

import gptk
from gptk.plugins import Fields, shown
from gptk_plugins.gguf_file import GGUFFile
from gptk_plugins.loaders._heads import check_head_dim, period_of
from gptk_plugins.loaders._rope_rules import rope_by_rule
from gptk_plugins.loaders._tensor_readers import naming


def _one(value: Any) -> Any:
    """A number, or the common value of a list with one for each layer."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


Size = Annotated[int, BeforeValidator(_one), Field(ge=1)]
Count = Annotated[int, BeforeValidator(_one), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_one)]


class Metadata(Fields):
    """Metadata of an architecture, by keys without its prefix."""

    context_length: Size
    embedding_length: Size
    block_count: Size
    feed_forward_length: Size
    head_count: Size = Field(alias="attention.head_count")
    head_count_kv: Size | None = Field(None, alias="attention.head_count_kv")
    key_length: Size | None = Field(None, alias="attention.key_length")
    sliding_window: Count = Field(0, alias="attention.sliding_window")
    window_pattern: list[bool] | Size | None = Field(None, alias="attention.sliding_window_pattern")
    layer_norm_epsilon: Number | None = Field(None, alias="attention.layer_norm_epsilon")
    rms_epsilon: Number | None = Field(None, alias="attention.layer_norm_rms_epsilon")
    attention_softcap: Number | None = Field(None, alias="attn_logit_softcapping")
    logit_softcap: Number | None = Field(None, alias="final_logit_softcapping")
    rope_base: Number = Field(10000.0, alias="rope.freq_base")
    window_rope_base: Number = Field(10000.0, alias="rope.freq_base_swa")
    rotary_dim: Size | None = Field(None, alias="rope.dimension_count")
    rope_scaling: str | None = Field(None, alias="rope.scaling.type")
    rope_factor: Number | None = Field(None, alias="rope.scaling.factor")
    rope_scale_linear: Number = Field(1.0, alias="rope.scale_linear")
    original_context: Size | None = Field(None, alias="rope.scaling.original_context_length")
    rope_attention: Number = Field(1.0, alias="rope.scaling.attn_factor")
    beta_fast: Number = Field(32.0, alias="rope.scaling.yarn_beta_fast")
    beta_slow: Number = Field(1.0, alias="rope.scaling.yarn_beta_slow")
    experts: Count = Field(0, alias="expert_count")
    experts_used: Count = Field(0, alias="expert_used_count")
    expert_width: Size | None = Field(None, alias="expert_feed_forward_length")
    parallel: bool = Field(False, alias="use_parallel_residual")

    @property
    def head_dim(self) -> int:
        return self.key_length or self.embedding_length // self.head_count


@dataclass(frozen=True)
class Architecture:
    """What the files of an architecture mean."""

    always: Mapping[str, Any] = field(default_factory=dict)
    """What its models are, as fields of `gptk.GPTConfig`; else they are as Llama's."""
    layer_norm: bool = False
    is_permuted: bool = False
    """llama.cpp rotates adjacent numbers of a head: queries and keys are in that order."""
    is_partial: bool = False
    """A part of each head may be rotated."""
    full_every: int | None = None
    """Every how manyth layer has no sliding window; None: all have it."""
    large: int = 0
    """A model with so many layers scales scores by the width of the heads' share of its width."""
    honored: tuple[str, ...] = ()
    """Keys of `NEUTRAL` that are read."""


_GEMMA = {"norms": "both", "mlp": "geglu-tanh"}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
ARCHITECTURES = {
    "gpt2": Architecture({"positions": "learned", "mlp": "gelu-tanh"}, layer_norm=True),
    "llama": Architecture(is_permuted=True, honored=("expert_count",)),
    "qwen2": Architecture(),
    "qwen3": Architecture({"qk_norm": True}),
    "qwen3moe": Architecture({"qk_norm": True}, honored=("expert_count",)),
    "phi3": Architecture(is_partial=True, honored=("rope.scaling.attn_factor",)),
    "olmo2": Architecture({"norms": "after", "qk_norm_joint": True}),
    "smollm3": Architecture({"rotary_layers": (True, True, True, False)}, is_permuted=True),
    "gemma2": Architecture(_GEMMA, full_every=2, large=46, honored=_CAPS),
    "gemma3": Architecture(_GEMMA | {"qk_norm": True}, full_every=6, large=62, honored=_CAPS[1:]),
    "gptneox": Architecture(
        {"mlp": "gelu"}, layer_norm=True, is_partial=True, honored=("use_parallel_residual",)
    ),
}


class General(Fields):
    """Metadata of the file."""

    architecture: str = Field(alias="general.architecture")
    part: int = Field(0, alias="split.no", ge=0)
    parts: int = Field(1, alias="split.count", ge=0)


def read_config(file: GGUFFile, tensors: gptk.Tensors, source: str) -> gptk.GPTConfig:
    """The configuration. Takes the tensors that are a part of it. Raises SourceError."""
    name = General.parse(file.fields, source).architecture
    if name not in ARCHITECTURES:
        raise gptk.SourceError(
            f"{source}: the architecture {shown(name)} is not supported; "
            f"{', '.join(ARCHITECTURES)} are"
        )
    architecture = ARCHITECTURES[name]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise gptk.SourceError(f"{source}: the matrix token_embd.weight is missing")
    own = {
        key.removeprefix(f"{name}."): value
        for key, value in file.fields.items()
        if key.startswith(f"{name}.")
    }
    metadata = Metadata.parse(own, f"{source}: the metadata of {name}")
    _check_supported(metadata, architecture, own, source)
    layer_norm = architecture.layer_norm
    eps = metadata.layer_norm_epsilon if layer_norm else metadata.rms_epsilon
    if eps is None:
        key = f"attention.layer_norm_{'' if layer_norm else 'rms_'}epsilon"
        raise gptk.SourceError(f"{source}: the metadata of {name} has no {key}")
    fields: dict[str, Any] = {
        "positions": "rotary",
        "mlp": "swiglu",
        "mlp_width": metadata.expert_width or metadata.feed_forward_length,
        **architecture.always,
    }
    with naming(source):
        if fields["positions"] == "rotary":
            fields |= _rope(metadata, architecture, tensors)
        return gptk.GPTConfig(
            vocab_size=embedding.shape[0],
            context_length=_context(metadata, fields),
            width=metadata.embedding_length,
            n_layers=metadata.block_count,
            n_heads=metadata.head_count,
            n_kv_heads=metadata.head_count_kv or metadata.head_count,
            head_dim=metadata.head_dim,
            norm="layer" if layer_norm else "rms",
            norm_eps=eps,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
            out_bias="blk.0.attn_output.bias" in tensors,
            parallel=metadata.parallel,
            tied_head="output.weight" not in tensors,
            **_windows(metadata, architecture),
            **_gemma(name, metadata, architecture),
            **_experts(metadata),
            **fields,
        )


def _context(metadata: Metadata, fields: dict[str, Any]) -> int:
    """The longest text: of a file that has LongRoPE's two rules, where the first one ends."""
    limit = fields.pop("context", None)
    return metadata.context_length if limit is None else min(limit, metadata.context_length)


def _windows(metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    if not metadata.sliding_window:
        return {}
    every, pattern = architecture.full_every, metadata.window_pattern
    if isinstance(pattern, int):
        every = pattern
    layers = None if every is None else (*((True,) * (every - 1)), False)
    if isinstance(pattern, list):
        if len(pattern) != metadata.block_count:
            raise gptk.SourceError(
                f"attention.sliding_window_pattern has {len(pattern)} layers, not "
                f"{metadata.block_count}"
            )
        layers = period_of(pattern[:4096])
    return {"window": metadata.sliding_window, "window_layers": layers}


def _gemma(name: str, metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    """What Gemma's models have, and no key tells."""
    if not name.startswith("gemma"):
        return {}
    fields: dict[str, Any] = {"embedding_scale": metadata.embedding_length**0.5}
    if metadata.block_count == architecture.large:
        fields["attention_scale"] = (metadata.embedding_length / metadata.head_count) ** -0.5
    if name == "gemma2":
        fields["attention_softcap"] = metadata.attention_softcap or 50.0
        fields["logit_softcap"] = metadata.logit_softcap or 30.0
    else:
        fields["logit_softcap"] = metadata.logit_softcap or None
        windows = metadata.sliding_window
        fields["window_rope_theta"] = metadata.window_rope_base if windows else None
    return fields


def _experts(metadata: Metadata) -> dict[str, Any]:
    if not metadata.experts:
        return {}
    if not 1 <= metadata.experts_used <= metadata.experts:
        raise gptk.SourceError(
            f"expert_used_count is {metadata.experts_used}; it must be 1 to expert_count, "
            f"{metadata.experts}"
        )
    return {"n_experts": metadata.experts, "n_experts_used": metadata.experts_used}


# --- What must be as it always is ------------------------------------------------------------

NEUTRAL = {
    "expert_count": 0,
    "expert_shared_count": 0,
    "expert_weights_scale": 0.0,
    "expert_group_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "use_parallel_residual": False,
}
"""Metadata that change what llama.cpp computes for some architecture, with the value that changes
nothing."""


def _check_supported(
    metadata: Metadata, architecture: Architecture, own: Mapping[str, Any], source: str
) -> None:
    """Raises SourceError for metadata that ask for what gptk.GPT does not compute."""
    supported = {"attention.value_length": metadata.head_dim, **NEUTRAL}
    if not architecture.is_partial:
        supported["rope.dimension_count"] = metadata.head_dim
    if metadata.rope_scaling == "yarn":
        del supported["rope.scaling.attn_factor"]
    for key, value in supported.items():
        if key not in architecture.honored and own.get(key, value) != value:
            raise gptk.SourceError(
                f"{source}: its {key} is {shown(own[key])}; only {value!r} is supported"
            )


# --- Rotary positions ------------------------------------------------------------------------

_SCALINGS = ("none", "linear", "yarn", "longrope")


def _rope(metadata: Metadata, architecture: Architecture, tensors: gptk.Tensors) -> dict[str, Any]:
    """Rotary positions, as fields of `gptk.GPTConfig`, and the `context` where they end."""
    scaling = metadata.rope_scaling or "linear"
    if scaling not in _SCALINGS:
        raise gptk.SourceError(
            f"rotary scaling {shown(scaling)} is not supported; {', '.join(_SCALINGS)} are"
        )
    head_dim = metadata.head_dim
    rotary_dim = metadata.rotary_dim or head_dim if architecture.is_partial else head_dim
    check_head_dim(head_dim)
    fields: dict[str, Any] = {
        "rope_theta": metadata.rope_base,
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
    }
    if "rope_factors_short.weight" in tensors:
        tensors.drop(["rope_factors_long.weight"])
        factors = _factors("rope_factors_short.weight", rotary_dim, tensors)
        context = metadata.original_context or metadata.context_length
        scale = metadata.rope_attention
        return fields | {"rope_factors": factors, "rope_scale": scale, "context": context}
    scale = 1.0
    if scaling != "none":
        scale = metadata.rope_scale_linear if metadata.rope_factor is None else metadata.rope_factor
    if "rope_freqs.weight" in tensors:
        factors = _factors("rope_freqs.weight", rotary_dim, tensors)
        return fields | {"rope_factors": tuple(scale * factor for factor in factors)}
    if scaling == "yarn":
        given = {
            "factor": scale,
            "original_max_position_embeddings": metadata.original_context
            or metadata.context_length,
            "beta_fast": metadata.beta_fast,
            "beta_slow": metadata.beta_slow,
        }
        rope = rope_by_rule(
            *("yarn", given, "rope.scaling", metadata.rope_base, rotary_dim),
            metadata.context_length,
        )
        return fields | {
            "rope_factors": rope.factors,
            "rope_scale": rope.scale * metadata.rope_attention,
        }
    if scale in (0.0, 1.0):
        return fields
    return fields | {"rope_factors": (scale,) * (rotary_dim // 2)}


def _factors(name: str, rotary_dim: int, tensors: gptk.Tensors) -> tuple[float, ...]:
    """The divisors of the rotary frequencies in a tensor."""
    factors = tensors.take(name)
    if tuple(factors.shape) != (rotary_dim // 2,):
        raise gptk.SourceError(
            f"the tensor {name} of shape {tuple(factors.shape)} does not fit heads of {rotary_dim}"
        )
    return tuple(factors.tolist())
