"""What kernels get besides tensors and numbers: slabs of blocks, and the blocks of a GPT.

They are made by `STRUCTURES`, which checks what they point to, once. Who has them made keeps alive
the tensors that they point to.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gptk.kernels.compiler import FEW_QUERIES
from gptk.kernels.door import Door, Signature
from gptk.kernels.formats import packed_bytes
from gptk.kernels.parameters import INT64, UINT8, Dtype, Input, Int, Made, Real, Written
from gptk.kernels.regions import Regions

HEADS = "head_dim in (32, 64, 96, 128, 256)"
PANELS = "outputs + -outputs % 16, inputs"
ALIGNED = "panels.data_ptr() % 64 == 0"
PACKED = ("weights.numel() == packed_bytes(format, outputs, inputs)",)
"""What quantized weights need, see `gptk.kernels.formats.packed_bytes`."""

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_NORMS = (
    *("attention_norm", "query_norm", "key_norm", "attention_post_norm"),
    *("mlp_norm", "mlp_post_norm"),
)
_IS_BFLOAT16 = "dtype is BFLOAT16"
_SEGMENTS = ("first", "second", "third")
_MATRICES = ("qkv", "out", "up", "down")


@dataclass(frozen=True)
class Slabs:
    """Memory for keys and values in blocks of 64 tokens."""

    addresses: Tensor
    """(slabs,) int64: where they are; 0 for those given back."""
    dtype: torch.dtype
    layers: int
    bits: int
    """A slab has 2 ** bits blocks."""
    kv_heads: int
    head_dim: int

    @property
    def address(self) -> int:
        return self.addresses.data_ptr()

    @property
    def count(self) -> int:
        return self.addresses.shape[0]

    @property
    def half(self) -> int:
        """Numbers of a slab that are the keys of a layer, or its values."""
        return self.kv_heads * 64 * self.head_dim << self.bits

    @cached_property
    def regions(self) -> Regions:
        """Where all keys and values are."""
        size = 2 * self.layers * self.half * self.dtype.itemsize
        return Regions((address, size) for address in self.addresses.tolist() if address)


@dataclass(frozen=True)
class StoredAddresses:
    """Where the blocks of a GGUF file's rows begin."""

    addresses: Tensor
    """(outputs,) int64."""
    format: int
    """As in cpp/formats.h."""
    inputs: int

    @property
    def address(self) -> int:
        return self.addresses.data_ptr()

    @property
    def outputs(self) -> int:
        return self.addresses.shape[0]


class Norm(ctypes.Structure):
    """A normalization of `size` numbers; without a weight there is none."""

    _fields_ = (
        *(("is_bfloat16", _INT), ("is_layer_norm", _INT)),
        *(("weight", _POINTER), ("bias", _POINTER)),
        *(("eps", ctypes.c_double), ("size", _INT)),
    )

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Address and bytes of its weight and bias."""
        size = self.size * (2 if self.is_bfloat16 else 4)
        return [(self.weight or 0, size), (self.bias or 0, size if self.bias else 0)]


class Segment(ctypes.Structure):
    """Consecutive outputs of a matrix whose quantized weights have one format."""

    _fields_ = (("format", _INT), ("weights", _POINTER), ("outputs", _INT), ("inputs", _INT))

    @property
    def part(self) -> tuple[int, int]:
        """Address and bytes of its weights."""
        return self.weights or 0, packed_bytes(self.format, self.outputs, self.inputs)


SEGMENTS = 3
"""The most segments of a matrix."""


class Matrix(ctypes.Structure):
    """A linear layer, with plain weights in panels or with quantized ones in segments."""

    _fields_ = (
        *(("is_bfloat16", _INT), ("panels", _POINTER), ("bias", _POINTER)),
        *(("inputs", _INT), ("outputs", _INT), ("segments", Segment * SEGMENTS)),
    )

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Address and bytes of its weights and bias."""
        width = 2 if self.is_bfloat16 else 4
        size = (self.outputs + -self.outputs % 16) * self.inputs * width
        plain = [(self.panels, size)] if self.panels else []
        segments = [segment.part for segment in self.segments]
        return [*plain, *segments, (self.bias or 0, self.outputs * width * bool(self.bias))]


def _quantized(
    is_bfloat16: int, bias: int | None, inputs: int, outputs: int, *segments: Segment
) -> Matrix:
    return Matrix(is_bfloat16, None, bias, inputs, outputs, (Segment * SEGMENTS)(*segments))


class Layer(ctypes.Structure):
    """A block of a GPT."""

    _fields_ = (
        *((name, Norm) for name in _NORMS),
        *((name, Matrix) for name in _MATRICES),
        *(("window", _INT), ("rope", _INT)),
    )

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Address and bytes of all its weights and biases."""
        return [part for name in _NORMS + _MATRICES for part in getattr(self, name).parts]


class Model(ctypes.Structure):
    """The blocks of a GPT."""

    _fields_ = (
        *((name, _INT) for name in ("is_bfloat16", "activation", "layers", "width")),
        *((name, _INT) for name in ("heads", "kv_heads", "head_size", "window", "ropes")),
        *(("layer", ctypes.POINTER(Layer)), ("norm", Norm)),
    )

    @property
    def address(self) -> int:
        return ctypes.addressof(self)

    @cached_property
    def regions(self) -> Regions:
        """Where all weights and biases are."""
        layers = [self.layer[i].parts for i in range(self.layers)]
        return Regions(part for parts in [*layers, self.norm.parts] for part in parts)


def _numbers(*numbers: int) -> tuple[int, ...]:
    return numbers


STRUCTURES = Door(
    (
        Signature(
            "slab",
            (Input("slab", "layers, 2, blocks, kv_heads, 64, head_dim", copied=False),),
            "slab, slab.dtype, layers, blocks.bit_length() - 1, kv_heads, head_dim",
            where=(HEADS, "layers > 0", "blocks > 0", "blocks & (blocks - 1) == 0", "kv_heads > 0"),
            makes=_numbers,
        ),
        Signature(
            "stored_rows",
            (
                Input("blocks", "rows, groups, size", (UINT8,), copied=False),
                Input("order", "outputs", (INT64,), optional=True),
                Int("size"),
                Written("y", None, (UINT8,)),
            ),
            "blocks, rows, groups",
            makes=_numbers,
        ),
        Signature(
            "norm",
            (
                Dtype("dtype"),
                Int("is_layer_norm"),
                Input("weight", "size", "dtype", copied=False),
                Input("bias", "size", "dtype", optional=True, copied=False),
                Real("eps"),
            ),
            f"{_IS_BFLOAT16}, is_layer_norm != 0, weight, bias, eps, size",
            where=("size % 16 == 0 or is_layer_norm",),
            makes=Norm,
        ),
        Signature(
            "matrix_in_panels",
            (
                Dtype("dtype"),
                Input("panels", PANELS, "dtype", copied=False),
                Int("outputs"),
                Input("bias", "outputs", "dtype", optional=True, copied=False),
            ),
            f"{_IS_BFLOAT16}, panels, bias, inputs, outputs",
            where=("outputs >= 0", "inputs % 2 == 0 or dtype is FLOAT32", ALIGNED),
            makes=Matrix,
        ),
        Signature(
            "segment",
            (
                Input("weights", None, (UINT8,), copied=False),
                Int("format"),
                Int("outputs"),
                Int("inputs"),
            ),
            "format, weights, outputs, inputs",
            where=PACKED,
            makes=Segment,
        ),
        Signature(
            "quantized_matrix",
            (
                Dtype("dtype"),
                *(Made(name, Segment) for name in _SEGMENTS),
                Int("outputs"),
                Input("bias", "outputs", "dtype", optional=True, copied=False),
            ),
            f"{_IS_BFLOAT16}, bias, first.inputs, outputs, {', '.join(_SEGMENTS)}",
            where=(
                "outputs == first.outputs + second.outputs + third.outputs",
                *(f"{name}.inputs in (first.inputs, 0)" for name in _SEGMENTS[1:]),
                *(f"{name}.inputs > 0 or {name}.outputs == 0" for name in _SEGMENTS[1:]),
                "first.outputs % 16 == 0 or second.outputs == third.outputs == 0",
                "second.outputs % 16 == 0 or third.outputs == 0",
            ),
            makes=_quantized,
        ),
        Signature(
            "layer",
            (
                Dtype("dtype"),
                *(Made(name, Norm) for name in _NORMS),
                *(Made(name, Matrix) for name in _MATRICES),
                *(Int(name) for name in ("window", "rope", "activation", "width")),
                *(Int(name) for name in ("heads", "kv_heads", "head_size")),
            ),
            ", ".join((*_NORMS, *_MATRICES, "window", "rope")),
            where=(
                "width > 0 and width % 16 == 0",
                "head_size in (32, 64, 96, 128, 256)",
                "0 <= window < 2**31",
                "rope in (0, 1, 2)",
                "activation in (0, 1, 2)",
                "kv_heads > 0 and heads > 0 and heads % kv_heads == 0",
                f"heads <= {FEW_QUERIES} * kv_heads",
                "attention_norm.size == mlp_norm.size == width",
                "attention_post_norm.size in (0, width)",
                "mlp_post_norm.size in (0, width)",
                "query_norm.size in (0, head_size)",
                "key_norm.size in (0, head_size)",
                *(f"{name}.is_bfloat16 == ({_IS_BFLOAT16})" for name in _MATRICES),
                *(f"{name}.is_bfloat16 == ({_IS_BFLOAT16}) or {name}.size == 0" for name in _NORMS),
                "(qkv.inputs, qkv.outputs) == (width, (heads + 2 * kv_heads) * head_size)",
                "(out.inputs, out.outputs) == (heads * head_size, width)",
                "down.outputs == width",
                "down.inputs > 0 and down.inputs % 16 == 0",
                "(up.inputs, up.outputs) == (width, down.inputs * (2 if activation else 1))",
            ),
            makes=Layer,
        ),
    ),
    lambda signature: signature.makes or tuple,
)
