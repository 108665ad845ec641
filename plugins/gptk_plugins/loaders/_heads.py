"""Attention heads, as configurations and files of several formats have them."""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def rotated_apart(head_dim: int, rotary_dim: int) -> Tensor:
    """The order of a head's numbers in `gptk.GPT`, where only the first `rotary_dim` are rotated.

    In transformers their first half is paired with their second; in `gptk.GPT` the first half of
    the head with its second, and those that are rotated come first in each. (head_dim,) int64.
    """
    rotated = torch.arange(rotary_dim).view(2, -1)
    rest = torch.arange(rotary_dim, head_dim).view(2, -1)
    return torch.cat((rotated, rest), dim=1).flatten()


def reorder_heads(
    tensor: Tensor | gptk.Levels, heads: Sequence[Tensor], sizes: Sequence[int], head_dim: int
) -> Tensor | gptk.Levels:
    """Rows of several parts, of sizes[i] heads each, each head in the order of heads[i]."""
    rows, first = [], 0
    for order, size in zip(heads, sizes, strict=True):
        begins = torch.arange(first, first + size)[:, None] * head_dim
        rows.append((begins + order).flatten())
        first += size
    order = torch.cat(rows)
    if len(order) != tensor.shape[0]:
        raise RuntimeError("heads that do not make up the tensor")  # named by gptk.Tensors
    return tensor[order]


def period_of(flags: Sequence[bool]) -> tuple[bool, ...] | None:
    """The shortest pattern of which these are repetitions; None if all are true."""
    if all(flags):
        return None
    for size in range(1, len(flags) + 1):
        if all(flag == flags[i % size] for i, flag in enumerate(flags)):
            return tuple(flags[:size])
    raise AssertionError
