"""A pass through all blocks of a GPT in one call. See cpp/walk.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptk.kernels.build import library
from gptk.kernels.formats import Format
from gptk.kernels.structures import (
    SEGMENTS,
    STRUCTURES,
    Layer,
    Matrix,
    Model,
    Norm,
    Segment,
    Slabs,
)


def norm_of(
    dtype: torch.dtype, weight: Tensor, bias: Tensor | None, eps: float, *, is_layer_norm: bool
) -> Norm:
    """A normalization: see `rms_norm` and `layer_norm`."""
    norm: Norm = STRUCTURES.norm(dtype, is_layer_norm, weight, bias, eps)
    return norm


def matrix_in_panels(
    dtype: torch.dtype, panels: Tensor, outputs: int, bias: Tensor | None
) -> Matrix:
    """A linear layer: see `linear_in_panels`."""
    matrix: Matrix = STRUCTURES.matrix_in_panels(dtype, panels, outputs, bias)
    return matrix


def quantized_matrix(
    dtype: torch.dtype,
    segments: Sequence[tuple[Tensor, Format, int]],
    inputs: int,
    bias: Tensor | None,
) -> Matrix:
    """A linear layer: see `quantized_linear`.

    segments: up to three, one after the other by outputs: weights, how they are stored, and how
    many outputs they have, whole blocks in all but the last one.
    """
    made = [
        STRUCTURES.segment(weights, format.number, outputs, inputs)
        for weights, format, outputs in segments
    ]
    made += [Segment() for _ in range(SEGMENTS - len(made))]
    outputs = sum(segment.outputs for segment in made)
    matrix: Matrix = STRUCTURES.quantized_matrix(dtype, *made, outputs, bias)
    return matrix


def model_of(
    dtype: torch.dtype,
    layers: Sequence[tuple[Norm | Matrix, ...]],
    norm: Norm,
    *,
    is_swiglu: bool,
    width: int,
    heads: int,
    kv_heads: int,
    head_size: int,
) -> Model:
    """The blocks of a GPT.

    layers: the norms and matrices of each, made for this dtype, in the order of the fields of
    `Layer`. norm: after the last layer. is_swiglu: else the MLP's activation is GELU.
    """
    sizes = width, heads, kv_heads, head_size
    made = [STRUCTURES.layer(dtype, *layer, is_swiglu, *sizes) for layer in layers]
    is_bfloat16 = dtype is torch.bfloat16
    if type(norm) is not Norm or (norm.size, norm.is_bfloat16) != (width, is_bfloat16):
        raise ValueError(f"gptk.kernels.model_of needs a last norm of {width} numbers in {dtype}")
    return Model(
        *(is_bfloat16, is_swiglu, len(made), *sizes),
        *((Layer * len(made))(*made), norm),
    )


def walk(
    model: Model,
    x: Tensor,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    tables: Tensor,
    slabs: Slabs,
    wanted: Tensor | None,
    layers: Sequence[int],
) -> Tensor:
    """The states of tokens after all blocks: (tokens asked of, 1 + layers, width).

    x: (tokens, width), the embeddings, overwritten. table: (2, positions, head_dim), cosines and
    sines, or without positions where the model has none; positions: (tokens,) int64, below the
    table's. sequences, tables, slabs: see `attend_blocks`. wanted: (n,) int64, the tokens asked of,
    in ascending order; None: all. layers: see `GPT.states`. x and table are contiguous.
    """
    kept = torch.tensor(layers, dtype=torch.int64, device="cpu")
    states: Tensor = library().walk(
        *(model, x, table, positions, sequences, tables, slabs, wanted, kept)
    )
    return states
