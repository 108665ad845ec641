"""What the families of Hugging Face's have in common: fields of config.json, layers, positions.

Every field that changes the model's output is honored as transformers 5 does, or refused. A field
that the family's class in transformers does not read changes nothing there, and is ignored here.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

import gptk
from gptk.plugins import Fields, shown
from gptk_plugins.loaders._heads import period_of
from gptk_plugins.loaders._rope_rules import Rope, rope_by_rule

Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]
LayerTypes = list[Literal["full_attention", "sliding_attention"]]
Window = tuple[int | None, Sequence[bool]]
"""The sliding window, and which layers have it; none: all."""
Made = tuple[gptk.GPTConfig, dict[str, str]]
"""A configuration, and notes for `gptk info`."""

GELUS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu": "gelu",
}
ACTIVATIONS = GELUS | {"relu": "relu"}


class Config(Fields):
    """Fields of all families, with the only value that is supported."""

    quantization_config: None = None
    per_layer_config: None = None
    is_causal: Literal[True] | None = None
    """transformers reads None as true."""
    vocab_size: Size

    def config(self, raw: Mapping[str, Any]) -> Made:
        """The model's configuration. raw: config.json. Raises SourceError."""
        raise NotImplementedError


class Rotary(Config):
    """What the families with rotary positions share."""

    partial: ClassVar[float | None] = None
    """The share of a head that is rotated where the file names none; None: it must be all."""
    rope_rules: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3", "yarn")

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    max_position_embeddings: Size
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: Positive = 10000.0
    partial_rotary_factor: float | None = None

    @property
    def heads(self) -> int:
        """The size of a head."""
        return self.hidden_size // self.num_attention_heads


class Llama(Rotary):
    """What Llama and the families after it share; defaults are those of their classes."""

    bias_on_qkv: ClassVar[bool] = False
    """Whether queries, keys and values always have biases."""
    always: ClassVar[Mapping[str, Any]] = {}
    """What else the family is, as fields of `gptk.GPTConfig`."""

    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False

    @property
    def heads(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> Window:
        """The sliding window, if layers have one."""
        return None, ()

    @property
    def more(self) -> dict[str, Any]:
        """As `always`, from fields that only some families have."""
        return {}

    def rope(self, raw: Mapping[str, Any]) -> Rope:
        """The rotary positions of layers without a window, and of the others, if they have none of
        their own."""
        return rope_of(self, raw)

    def config(self, raw: Mapping[str, Any]) -> Made:
        notes, context = {}, self.max_position_embeddings
        rope = self.rope(raw)
        if rope.context is not None and rope.context < context:
            notes["context"] = f"{rope.context}, limited from {context} by longrope"
            context = rope.context
        window, slides = self.window
        attention_bias = getattr(self, "attention_bias", False)
        fields: dict[str, Any] = {
            "mlp_width": self.intermediate_size,
            "mlp": "swiglu",
            "mlp_bias": getattr(self, "mlp_bias", False),
            "window": window,
            "window_layers": None if window is None else period_of(slides),
            **rope_fields(rope, self.heads),
            **self.always,
            **self.more,
        }
        config = gptk.GPTConfig(
            vocab_size=self.vocab_size,
            context_length=context,
            width=self.hidden_size,
            n_layers=self.num_hidden_layers,
            n_heads=self.num_attention_heads,
            n_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.heads,
            norm="rms",
            norm_eps=self.rms_norm_eps,
            positions="rotary",
            qkv_bias=attention_bias or self.bias_on_qkv,
            out_bias=attention_bias,
            tied_head=self.tie_word_embeddings,
            **fields,
        )
        return config, notes


def activation(known: Mapping[str, str], **given: str) -> Any:
    """The MLP's activation. given: the field's name, and its value."""
    ((name, value),) = given.items()
    if value not in known:
        raise gptk.SourceError(f"{name} {shown(value)} is not supported; {', '.join(known)} are")
    return known[value]


def divided(hidden_size: int, heads: int) -> int:
    """The size of a head. Raises SourceError if the heads do not make up the width."""
    if hidden_size % heads:
        raise gptk.SourceError(
            f"num_attention_heads is {heads}, which does not divide hidden_size, {hidden_size}"
        )
    return hidden_size // heads


def experts(count: int, used: int) -> dict[str, Any]:
    """Fields of a `gptk.GPTConfig`."""
    if used > count:
        raise gptk.SourceError(f"num_experts_per_tok is {used}; there are {count} experts")
    return {"n_experts": count, "n_experts_used": used}


# --- Layers ----------------------------------------------------------------------------------


def checked_layers(count: int) -> int:
    """How many layers, where something is listed for each. Raises SourceError if too many."""
    if count > 4096:
        raise gptk.SourceError(f"num_hidden_layers is {count:,}; no model has so many layers")
    return count


def window_of(window: int | None, layer_types: Sequence[str], count: int) -> Window:
    """The sliding window of the layers that have one by their types."""
    if len(layer_types) != count:
        raise gptk.SourceError(
            f"layer_types names {len(layer_types)} layers, and num_hidden_layers is {count}"
        )
    checked_layers(count)
    slides = [kind == "sliding_attention" for kind in layer_types]
    if any(slides) and window is None:
        raise gptk.SourceError(
            "layer_types has sliding_attention, and use_sliding_window or sliding_window says that "
            "there is none"
        )
    return window if any(slides) else None, slides


# --- Rotary positions ------------------------------------------------------------------------


class RopeParameters(Fields):
    """rope_scaling, or else rope_parameters."""

    rope_type: str = "default"
    type: str = "default"
    rope_theta: Positive = 10000.0
    partial_rotary_factor: float = 1.0
    full_attention: None = None
    sliding_attention: None = None

    def kind_in(self, given: Mapping[str, Any]) -> str:
        """The rule's name."""
        return self.rope_type if "rope_type" in given else self.type


def rope_of(fields: Rotary, raw: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Rope:
    """Rotary positions. given: its parameters, if not rope_scaling, or else rope_parameters."""
    where = "rope_scaling" if fields.rope_scaling else "rope_parameters"
    if given is None:
        given = fields.rope_scaling or fields.rope_parameters or {}
    rope = RopeParameters.parse(given, where)
    partial = 1.0 if fields.partial is None else fields.partial
    if "partial_rotary_factor" in given:
        partial = rope.partial_rotary_factor
    elif fields.partial_rotary_factor is not None:
        partial = fields.partial_rotary_factor
    if not 0 < partial <= 1 or (fields.partial is None and partial != 1.0):
        raise gptk.SourceError(f"partial_rotary_factor is {partial}; it must be 1.0")
    rotary_dim = int(fields.heads * partial)
    if partial != 1.0 and (rotary_dim < 2 or rotary_dim % 2):
        raise gptk.SourceError(
            f"partial_rotary_factor is {partial}: {rotary_dim} of {fields.heads} numbers of a head "
            "cannot be rotated"
        )
    theta = rope.rope_theta if "rope_theta" in given else fields.rope_theta
    kind = rope.kind_in(given)
    if "longrope" in fields.rope_rules and kind in ("su", "yarn"):
        kind = "longrope"  # as it was called in the first files of Phi-3
    if kind not in fields.rope_rules:
        *others, last = fields.rope_rules
        raise gptk.SourceError(
            f"{where}: rope_type is {shown(kind)}; {', '.join(others)} and {last} are supported"
        )
    # The original context is looked for beside the rule, too, and there it counts more.
    original = "original_max_position_embeddings"
    known = getattr(fields, original, given.get(original, fields.max_position_embeddings))
    rule = {**given, original: raw.get(original, known)}
    return rope_by_rule(kind, rule, where, theta, rotary_dim, fields.max_position_embeddings)


def rope_fields(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Fields of a `gptk.GPTConfig`."""
    return {
        "rotary_dim": None if rope.rotary_dim == head_dim else rope.rotary_dim,
        "rope_theta": rope.theta,
        "rope_factors": rope.factors,
        "rope_scale": rope.scale,
    }
