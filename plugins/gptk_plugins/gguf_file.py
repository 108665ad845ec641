"""The GGUF file format: metadata, then tensors, plain or quantized in blocks.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Metadata is parsed from a memory
mapping, in 0.1 s for the 98,000 strings of SmolLM2's tokenizer; gguf.GGUFReader, which makes NumPy
arrays of every string, takes 3.4 s.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptk
from gptk.plugins import shown
from gptk_plugins.mapped_file import MappedFile

if TYPE_CHECKING:  # PyTorch is not needed for the metadata, such as a tokenizer's
    from torch import Tensor

_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file."""

    shape: tuple[int, ...]
    """In PyTorch's order; GGUF stores it reversed, fastest axis first."""
    type: str
    """The storage type by ggml's name: F32, Q4_1, …"""
    nbytes: int
    """Its size in the file."""
    read: "Callable[[], Tensor]"
    """Reads the tensor: in its floating type if stored in one, else dequantized to float32."""
    read_levels: "Callable[[], gptk.Levels] | None"
    """Reads the quantized tensor; None unless it is a matrix of _AS_LEVELS."""
    split: "Callable[[], list[StoredTensor]]"
    """The tensors that it is a stack of, by its first axis."""

    @property
    def is_expanded(self) -> bool:
        """Whether it is quantized, and can only be read dequantized."""
        return self.read_levels is None and self.type not in _PLAIN


@dataclass(frozen=True)
class GGUFFile:
    """The metadata of a file by key, and its tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a GGUF file; its tensors are read lazily.

    Raises SourceError if it is missing, cut short, or not a GGUF file of version 2 or 3.
    """
    file = MappedFile(path)
    begin = file.file.read(4)
    if begin != b"GGUF":
        raise gptk.SourceError(f"{path} is not a GGUF file: it begins with {begin!r}")
    with mmap.mmap(file.file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(data, file, path)
        except (struct.error, EOFError):
            raise gptk.SourceError(
                f"{path}: the file is cut short within its metadata, at {file.size:,} bytes"
            ) from None
        except _MalformedError as problem:
            raise gptk.SourceError(f"{path} is damaged: {problem}") from None


class _MalformedError(Exception):
    """The metadata break a rule of the format."""


def _parse(data: mmap.mmap, file: MappedFile, path: Path) -> GGUFFile:
    cursor = _Cursor(data, 4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise gptk.SourceError(
            f"{path}: GGUF version {version} is not supported; 2 and 3 are, little-endian"
        )
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    for what, count in (("tensors", n_tensors), ("fields", n_fields)):
        if count > _MAX_COUNT:
            raise _MalformedError(f"it would have {count:,} {what}; {_MAX_COUNT:,} are the most")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = cursor.string()
        if key in fields:
            raise _MalformedError(f"the key {shown(key)} occurs twice")
        fields[key] = cursor.value(cursor.number("I"))
    infos = {}
    for _ in range(n_tensors):
        name, n_axes = cursor.string(), cursor.number("I")
        if name in infos:
            raise _MalformedError(f"the tensor {shown(name)} occurs twice")
        if n_axes > _MAX_AXES:
            raise _MalformedError(f"the tensor {shown(name)} has more than {_MAX_AXES} axes")
        shape = tuple(cursor.number("Q") for _ in range(n_axes))[::-1]
        infos[name] = (shape, cursor.number("I"), cursor.number("Q"))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment.bit_count() != 1:
        raise _MalformedError(f"general.alignment is {shown(alignment)}; it must be a power of 2")
    base = _aligned(cursor.position, alignment)
    tensors, end = {}, 0
    for name, (shape, kind, offset) in infos.items():
        what = f"{path}: the tensor {name}"
        # llama.cpp reads only files whose tensors follow each other, in the order of their names.
        if offset != end:
            raise gptk.SourceError(f"{what} begins at byte {offset:,} of the tensors, not {end:,}")
        tensors[name] = _stored(file, what, shape, kind, base + offset)
        end = _aligned(offset + tensors[name].nbytes, alignment)
    return GGUFFile(fields, tensors)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


_MAX_COUNT = 1 << 16
"""Tensors, or fields of the metadata; llama.cpp's largest models have some 2,000 tensors."""
_MAX_AXES = 4
_MAX_ITEMS = 1 << 22
"""Items of all lists of the metadata together: as Python objects they take up to 60 bytes each. A
vocabulary of 256,000 tokens with scores, types and merges has 1.3 million."""


class _Cursor:
    """Reads one value after the other. Raises struct.error or EOFError at the end of the data."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position
        self._size = len(data)
        self._items = 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.position)
        self.position += struct.calcsize("<" + form)
        return value

    def string(self) -> str:
        (size,) = _SIZE.unpack_from(self.data, self.position)
        start = self.position + 8
        self.position = start + size
        if self.position > self._size:
            raise EOFError
        # Tokens of some vocabularies are not valid UTF-8; surrogates keep their bytes.
        return self.data[start : self.position].decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise _MalformedError(f"a field has the type {kind}, which is none of GGUF's")
        return self.number(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        form = _SCALARS.get(kind)
        if form is None and kind != _STRING:
            raise _MalformedError(
                f"a list holds items of type {kind}, which are no numbers or strings"
            )
        # The size is compared first: a count is believed only as far as the file goes.
        size = count * (8 if form is None else struct.calcsize(form))
        if self.position + size > self._size:
            raise EOFError
        self._items += count
        if self._items > _MAX_ITEMS:
            raise _MalformedError(f"its lists have more than {_MAX_ITEMS:,} items together")
        if form is None:
            return [self.string() for _ in range(count)]
        values = struct.unpack_from(f"<{count}{form}", self.data, self.position)
        self.position += size
        return list(values)


_SIZE = struct.Struct("<Q")


def _stored(
    file: MappedFile, what: str, shape: tuple[int, ...], kind: int, start: int
) -> StoredTensor:
    name, block, block_bytes = _type(kind, what)
    if not math.prod(shape) or not shape:
        raise gptk.SourceError(f"{what} is empty: its shape is {shape}")
    if shape[-1] % block:
        raise gptk.SourceError(f"{what} has rows of {shape[-1]}, no multiple of {name}'s {block}")
    size = math.prod(shape) // block * block_bytes
    if start + size > file.size:
        raise gptk.SourceError(
            f"{what} ends at byte {start + size:,}; the file is cut short at {file.size:,}"
        )

    has_levels = len(shape) == 2 and name in _AS_LEVELS

    def read_levels() -> "gptk.Levels":
        blocks = file.bytes(start, size).view(shape[0], -1, block_bytes)
        return gptk.Levels.from_blocks(blocks, name)

    def read() -> "Tensor":
        import torch

        if has_levels:
            return read_levels().dense()
        if name in _PLAIN:
            return file.numbers(start, size, getattr(torch, _PLAIN[name])).view(shape)
        raw = file.bytes(start, size)
        return _dequantize(raw.view(-1, block_bytes), kind, what).view(shape)

    def split() -> list[StoredTensor]:
        step = size // shape[0]
        starts = range(start, start + size, step)
        return [_stored(file, what, shape[1:], kind, part) for part in starts]

    return StoredTensor(shape, name, size, read, read_levels if has_levels else None, split)


# By ggml's number: the name, the numbers per block and the bytes per block. The package gguf knows
# all types, but is slow to import.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}
_AS_LEVELS = {name for name, block, _ in _TYPES.values() if block > 1}
"""The types that can be read without dequantizing them."""


def _type(kind: int, what: str) -> tuple[str, int, int]:
    if kind in _TYPES:
        return _TYPES[kind]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        ggml_type = GGMLQuantizationType(kind)
    except ValueError:
        raise gptk.SourceError(f"{what} is stored as type {kind}, which is unknown") from None
    return ggml_type.name, *GGML_QUANT_SIZES[ggml_type]


_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_CHUNK = 1 << 16  # blocks that are dequantized at a time


def _dequantize(blocks: "Tensor", kind: int, what: str) -> "Tensor":
    """The numbers in some blocks, float32: (blocks, numbers). blocks: (blocks, bytes per block)."""
    import gguf
    import torch

    ggml_type = gguf.GGMLQuantizationType(kind)
    values = torch.empty(len(blocks), gguf.GGML_QUANT_SIZES[ggml_type][0])
    try:
        # As one long row: gguf dequantizes 16 rows at a time, and rows of real tensors are so short
        # that it takes 9 times as long. In chunks: its intermediates take several times the memory.
        for start in range(0, len(blocks), _CHUNK):
            part = blocks[start : start + _CHUNK].numpy()
            numbers = gguf.quants.dequantize(part.reshape(1, -1), ggml_type)
            values[start : start + _CHUNK].numpy()[:] = numbers.reshape(len(part), -1)
    except NotImplementedError:
        raise gptk.SourceError(
            f"{what} is stored as {ggml_type.name}, which is not supported; F32, F16, BF16, "
            "Q4_0 to Q8_0, the K and the IQ types are"
        ) from None
    return values
