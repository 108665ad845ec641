"""The size of attention heads, as configurations of several formats imply it."""

import gptk


def head_dim_of(width: int, n_heads: int) -> int:
    """The size of each head. Raises SourceError if the width does not divide into the heads."""
    if width % n_heads:
        raise gptk.SourceError(f"a width of {width} does not divide into {n_heads} heads")
    return width // n_heads


def check_head_dim(head_dim: int) -> None:
    """Raise SourceError for heads larger than any model's, before rotary factors are listed."""
    if head_dim > 1 << 16:
        raise gptk.SourceError(f"no model has heads of {head_dim:,}")
