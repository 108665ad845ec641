"""The configuration of a GPT."""

from dataclasses import dataclass, fields
from typing import Literal

from gptk.errors import SourceError


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and kinds of the parts of a GPT. Defaults are GPT-2's; sizes have none."""

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
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (not isinstance(value, int) or value < 1):
                raise SourceError(f"the model's {field.name} is {value!r}; it must be 1 or more")
        if self.n_heads % self.n_kv_heads:
            raise SourceError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key and value heads"
            )
        if self.rope_factors is not None:
            object.__setattr__(self, "rope_factors", tuple(self.rope_factors))
            if len(self.rope_factors) != self.head_dim // 2:
                raise SourceError(
                    f"{len(self.rope_factors)} rotary factors do not fit heads of {self.head_dim}"
                )
