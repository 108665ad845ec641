"""The configuration of a GPT."""

import math
from dataclasses import dataclass
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
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None
    """Divisors of the head_dim / 2 rotary frequencies, for models whose context was extended."""
    mlp: Literal["gelu-tanh", "gelu", "swiglu"] = "gelu-tanh"
    mlp_bias: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    """A bias on attention's output projection."""
    qk_norm: bool = False
    """Normalize each head's queries and keys, as Qwen3 does."""
    tied_head: bool = True
    """The output head is the token embedding's matrix."""

    def __post_init__(self) -> None:
        for name, allowed in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if name == "norm_eps" and type(value) in (int, float) and value == 0:
                continue  # no epsilon
            if problem := _problem(value, allowed):
                raise SourceError(f"the model's {name} is {value!r:.60}; it must be {problem}")
        if self.n_heads % self.n_kv_heads:
            raise SourceError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key and value heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise SourceError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.rope_factors is not None:
            object.__setattr__(self, "rope_factors", tuple(self.rope_factors))
            if len(self.rope_factors) != self.head_dim // 2:
                raise SourceError(
                    f"{len(self.rope_factors)} rotary factors do not fit heads of {self.head_dim}"
                )


def _problem(value: object, allowed: Any) -> str | None:
    """What a value must be, if it is not: a size, a finite number, or one of several texts."""
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
    if value is None or (isinstance(value, list | tuple) and all(map(_is_positive, value))):
        return None
    return "a list of finite numbers above 0"


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf


MAX_SIZE = 2**31 - 1
"""The largest size of any part of a model."""
