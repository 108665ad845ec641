"""The configuration of a GPT."""

import math
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gptk.errors import SourceError


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and kinds of the parts of a GPT. Defaults are GPT-2's; sizes have none.

    Raises SourceError for a value of the wrong type, a size that is not positive, a number that is
    not finite and positive, and parts that do not fit together.
    """

    vocab_size: int
    context_length: int
    """The window: the most tokens that a prediction can depend on, the last one included."""
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """Heads for keys and values; each serves n_heads / n_kv_heads query heads."""
    head_dim: int
    mlp_width: int
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norms: Literal["before", "after", "both"] = "before"
    """Whether what attention and the MLP read is normalized, what they add to the residual stream
    (OLMo 2), or both (Gemma)."""
    parallel: bool = False
    """Attention and the MLP read the same residual stream (GPT-NeoX)."""
    embedding_scale: float = 1.0
    """What token embeddings are multiplied by."""
    positions: Literal["learned", "rotary"] = "learned"
    rotary_dim: int | None = None
    """How many numbers of a head are rotated: the first rotary_dim / 2 of each half. None: all."""
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None
    """Divisors of the rotary frequencies, for models whose context was extended."""
    rope_scale: float = 1.0
    """What cosines and sines are multiplied by (YaRN's attention factor)."""
    rotary_layers: tuple[bool, ...] | None = None
    """Which layers rotate, of rotary ones (SmolLM3), repeated as often as needed. None: all."""
    window: int | None = None
    """The sliding window: how many tokens, the last ones, a query sees in layers that have it."""
    window_layers: tuple[bool, ...] | None = None
    """Which layers have the sliding window, repeated as often as needed. None: all."""
    window_rope_theta: float | None = None
    """`rope_theta` of the layers with a window, which then have no factors and no scale (Gemma 3).
    None: as in the others."""
    attention_scale: float | None = None
    """What scores are multiplied by. None: 1 / √head_dim."""
    attention_softcap: float | None = None
    """Bounds scores softly: cap · tanh(score / cap). None: no bound."""
    logit_softcap: float | None = None
    """Bounds logits likewise."""
    mlp: Literal["gelu-tanh", "gelu", "relu", "swiglu", "geglu-tanh"] = "gelu-tanh"
    mlp_bias: bool = True
    n_experts: int | None = None
    """MLPs in each layer, of which each token is given to some (Mixtral). None: one for all."""
    n_experts_used: int | None = None
    """To how many of the MLPs each token is given."""
    normalize_experts: bool = True
    """The weights of the MLPs that are used add up to 1."""
    qkv_bias: bool = True
    out_bias: bool = True
    """A bias on attention's output projection."""
    qk_norm: bool = False
    """Normalize each head's queries and keys, as Qwen3 does."""
    qk_norm_joint: bool = False
    """Normalize the queries of all heads together, and so the keys, as OLMo 2 does."""
    tied_head: bool = True
    """The output head is the token embedding's matrix."""

    def __post_init__(self) -> None:
        for name, allowed in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if name == "norm_eps" and type(value) in (int, float) and value == 0:
                continue  # no epsilon
            if problem := _problem(value, allowed):
                raise SourceError(f"the model's {name} is {value!r:.60}; it must be {problem}")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.n_heads % self.n_kv_heads:
            raise SourceError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key and value heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise SourceError(f"rotary positions need an even head_dim, not {self.head_dim}")
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotated % 2 or rotated > self.head_dim:
            raise SourceError(f"{rotated} of {self.head_dim} numbers of a head cannot be rotated")
        if self.rope_factors is not None and len(self.rope_factors) != rotated // 2:
            raise SourceError(
                f"{len(self.rope_factors)} rotary factors do not fit heads of {rotated}"
            )
        self._check_experts()
        if self.qk_norm and self.qk_norm_joint:
            raise SourceError("queries are normalized head by head or all together, not both")

    def _check_experts(self) -> None:
        used, all_experts = self.n_experts_used, self.n_experts
        if (used is None) != (all_experts is None):
            raise SourceError("n_experts and n_experts_used are needed together")
        if used is not None and all_experts is not None and not used <= all_experts <= MAX_EXPERTS:
            raise SourceError(
                f"{used} of {all_experts} experts cannot be used; there may be {MAX_EXPERTS}"
            )

    def has_window(self, layer: int) -> bool:
        """Whether a layer has the sliding window."""
        return self.window is not None and _repeated(self.window_layers, layer)

    @property
    def window_of_all(self) -> int | None:
        """The sliding window, if all layers have it: what is before it is not seen again."""
        has_all = all(self.has_window(layer) for layer in range(self.n_layers))
        return self.window if has_all else None

    def rope_of(self, layer: int) -> int | None:
        """Which of `ropes` a layer has; None if it does not rotate."""
        if self.positions == "learned" or not _repeated(self.rotary_layers, layer):
            return None
        return int(self.window_rope_theta is not None and self.has_window(layer))

    @property
    def ropes(self) -> int:
        """How many kinds of rotary positions there are."""
        if self.positions == "learned":
            return 0
        return 1 if self.window_rope_theta is None else 2


def _repeated(layers: tuple[bool, ...] | None, layer: int) -> bool:
    return layers is None or layers[layer % len(layers)]


def _problem(value: object, allowed: Any) -> str | None:
    """What a value must be, if it is not: a size, a finite number, or one of several texts."""
    if NoneType in get_args(allowed):
        (kind,) = (kind for kind in get_args(allowed) if kind is not NoneType)
        return None if value is None else _problem(value, kind)
    if allowed is int:
        fits = type(value) is int and 1 <= value <= MAX_SIZE
        return None if fits else f"a whole number from 1 to {MAX_SIZE:,}"
    if allowed is bool:
        return None if isinstance(value, bool) else "true or false"
    if get_origin(allowed) is Literal:
        texts = get_args(allowed)
        return None if value in texts else f"one of {', '.join(texts)}"
    if allowed is float:
        return None if _is_positive(value) else "a finite number above 0"
    (item, _) = get_args(allowed)
    if isinstance(value, list | tuple) and value and not any(_problem(x, item) for x in value):
        return None
    return "a list of true and false" if item is bool else "a list of finite numbers above 0"


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf


MAX_SIZE = 2**31 - 1
"""The largest size of any part of a model."""
MAX_EXPERTS = 1024
"""The most MLPs of a layer: each is made, before it is known whether the file has it."""
