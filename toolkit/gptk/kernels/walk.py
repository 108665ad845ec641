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
    windows: Sequence[int],
    ropes: Sequence[int],
    activation: str,
    width: int,
    heads: int,
    kv_heads: int,
    head_size: int,
) -> Model:
    """The blocks of a GPT.

    layers: the norms and matrices of each, made for this dtype, in the order of the fields of
    `Layer`. norm: after the last layer. windows: of each layer how many tokens a query sees, the
    last ones, 0: all; layers that have a window have the same. ropes: of each layer which table of
    cosines and sines it has, from 1; 0: none. activation: of the MLPs, one of ACTIVATIONS.
    """
    sizes = width, heads, kv_heads, head_size
    if activation not in ACTIVATIONS or len({*windows} - {0}) > 1:
        raise ValueError(f"gptk.kernels.model_of cannot take {activation}, or several windows")
    number = ACTIVATIONS.index(activation)
    made = [
        STRUCTURES.layer(dtype, *layer, window, rope, number, *sizes)
        for layer, window, rope in zip(layers, windows, ropes, strict=True)
    ]
    is_bfloat16 = dtype is torch.bfloat16
    if type(norm) is not Norm or (norm.size, norm.is_bfloat16) != (width, is_bfloat16):
        raise ValueError(f"gptk.kernels.model_of needs a last norm of {width} numbers in {dtype}")
    return Model(
        *(is_bfloat16, number, len(made), *sizes),
        *(max(windows, default=0), max(ropes, default=0)),
        *((Layer * len(made))(*made), norm),
    )


ACTIVATIONS = ("gelu-tanh", "swiglu", "geglu-tanh")
"""In the order of Activation in cpp/walk.h."""


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

    x: (tokens, width), the embeddings, overwritten. table: (kinds, 2, positions, head_dim), cosines
    and sines, or no kinds where the model has no rotary positions; positions: (tokens,) int64,
    below the table's. sequences, tables, slabs: see `attend_blocks`. wanted: (n,) int64, the tokens
    asked of, in ascending order; None: all. layers: see `GPT.states`. x and table are contiguous.
    """
    kept = torch.tensor(layers, dtype=torch.int64, device="cpu")
    states: Tensor = library().walk(
        *(model, x, table, positions, sequences, tables, slabs, wanted, kept)
    )
    return states
