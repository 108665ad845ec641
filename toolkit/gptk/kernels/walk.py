"""A pass through all blocks of a GPT in one call. See cpp/walk.h, which has the same structures."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from gptk.kernels.arguments import BFLOAT16, INT32, INT64, are, are_floats, fail, refuse
from gptk.kernels.attention import BLOCK
from gptk.kernels.build import library

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Norm(ctypes.Structure):
    """A normalization; without a weight there is none."""

    _fields_ = (
        *(("is_layer_norm", _INT), ("weight", _POINTER), ("bias", _POINTER)),
        ("eps", ctypes.c_double),
    )


class Matrix(ctypes.Structure):
    """A linear layer. bits: 0 for plain weights in panels, 4 or 8 for quantized ones."""

    _fields_ = (
        *(("bits", _INT), ("weights", _POINTER), ("bias", _POINTER)),
        *(("inputs", _INT), ("outputs", _INT)),
    )


class Layer(ctypes.Structure):
    """A block of a GPT."""

    _fields_ = (
        *((name, Norm) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, Matrix) for name in ("qkv", "out", "up", "down")),
    )


class Model(ctypes.Structure):
    """The blocks of a GPT. Who makes it keeps alive what it points to."""

    _fields_ = (
        *((name, _INT) for name in ("is_bfloat16", "is_swiglu", "layers", "width")),
        *((name, _INT) for name in ("heads", "kv_heads", "head_size")),
        *(("layer", ctypes.POINTER(Layer)), ("norm", Norm)),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *(("tokens", _INT), ("x", _POINTER), ("cosines", _POINTER), ("sines", _POINTER)),
        *(("positions", _POINTER), ("sequences", _POINTER), ("tables", _POINTER)),
        *(("slabs", _POINTER), ("count", _INT), ("slab_bits", _INT), ("half", _INT)),
        *(("wanted", _POINTER), ("wanted_count", _INT), ("kept", _POINTER), ("kept_count", _INT)),
        ("states", _POINTER),
    )


def walk(
    model: Model,
    x: Tensor,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    tables: Tensor,
    slabs: Tensor,
    sample: Tensor,
    wanted: Tensor | None,
    layers: Sequence[int],
) -> Tensor:
    """The states of tokens after all blocks: (tokens asked of, 1 + layers, width).

    x: (tokens, width), the embeddings, overwritten. table: (2, positions, head_dim), cosines and
    sines, or without positions where the model has none; positions: (tokens,) int64, below the
    table's. sequences, tables, slabs, sample: see `attend_blocks`. wanted: (n,) int64, the tokens
    asked of, in ascending order; None: all. layers: see `GPT.states`. All are contiguous.
    """
    tokens, width = x.shape
    layer_count, _, blocks, kv_heads, block, d = sample.shape
    kept = torch.tensor(layers, dtype=torch.int64)
    asked = tokens if wanted is None else wanted.shape[0]
    if (
        (width, d, kv_heads) != (model.width, model.head_size, model.kv_heads)
        or model.layers > layer_count
        or (x.dtype is BFLOAT16) != model.is_bfloat16
        or not are_floats(x, sample, table if table.shape[1] else None)
        or not are(INT64, positions, sequences, slabs)
        or not are(INT32, tables)
        or not (x.is_contiguous() and sample.is_contiguous() and table.is_contiguous())
        or positions.shape != (tokens,)
        or sequences.shape[1:] != (4,)
        or block != BLOCK
        or table.shape[0::2] != (2, d)
        or not (positions.is_contiguous() and sequences.is_contiguous())
        or not (tables.is_contiguous() and slabs.is_contiguous())
        or (wanted is not None and not (are(INT64, wanted) and wanted.is_contiguous()))
    ):
        refuse("walk", x=x, table=table, positions=positions, sequences=sequences, sample=sample)
    states = x.new_empty(asked, 1 + len(layers), width)
    rotates = table.shape[1] > 0
    cosines = table.data_ptr() if rotates else None
    arguments = _Pass(
        *(tokens, x.data_ptr(), cosines),
        table.data_ptr() + table[0].nbytes if rotates else None,
        *(positions.data_ptr(), sequences.data_ptr(), tables.data_ptr(), slabs.data_ptr()),
        *(sequences.shape[0], blocks.bit_length() - 1, blocks * kv_heads * block * d),
        None if wanted is None else wanted.data_ptr(),
        -1 if wanted is None else asked,
        *(kept.data_ptr(), len(layers), states.data_ptr()),
    )
    if status := library().gptk_walk(ctypes.byref(model), ctypes.byref(arguments)):
        fail(status)
    return states
