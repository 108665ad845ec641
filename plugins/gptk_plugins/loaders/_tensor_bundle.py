"""TensorFlow's checkpoint files, the "tensor bundle": NAME.index and NAME.data-00000-of-00001, …

The index is a table in LevelDB's format (google/leveldb, doc/table_format.md), from a tensor's name
to a protocol buffer with its data file and offset (tensorflow, core/protobuf/tensor_bundle.proto).
Each block of the table and each tensor has a CRC-32C, rotated and offset ("masked"); all are
checked, by google-crc32c at 10 GB/s.
"""

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

import gptk
from gptk.plugins import open_regular, shown
from gptk_plugins.mapped_file import MappedFile

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER = 48  # two block handles, padded, and the magic number
_MAX_KEY = 1 << 12  # bytes
_MAX_TENSORS = 1 << 16  # GPT-2's largest model has 580
_TRAILER = 5  # after a block: a byte for its compression, and its checksum
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


def read_bundle(prefix: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a checkpoint. prefix: its path without `.index`.

    The tensors are mapped, not read. Raises SourceError, now or when a tensor is read, for a file
    that is missing, cut short, damaged, or of a kind that is not supported.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    named: dict[str, _Entry] = {}
    try:
        entries = _table(_content(index), index)
        key, header = next(entries)  # the empty key comes first
        if key:
            raise ValueError("there is no header")
        fields = _message(header)
        n_shards = _integer(fields, 1)
        if _integer(fields, 2):
            raise gptk.SourceError(f"{index} is of a big-endian machine, which is not supported")
        for key, value in entries:
            if len(named) == _MAX_TENSORS:
                raise gptk.SourceError(f"{index} has more than {_MAX_TENSORS:,} tensors")
            named[key.decode()] = _entry(value)
    except (StopIteration, IndexError, ValueError, struct.error):
        raise gptk.SourceError(f"{index} is damaged: it is not an index of tensors") from None
    shards = {
        shard: MappedFile(prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{n_shards:05}"))
        for shard in sorted({entry.shard for entry in named.values()})
    }
    _check_apart(named, index)
    return {name: partial(_read, name, entry, shards[entry.shard]) for name, entry in named.items()}


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MAX_INDEX:
            raise gptk.SourceError(f"{path} is no index of tensors: it is too large")
        return file.read()


_MAX_INDEX = 1 << 24
"""Bytes; that of GPT-2's largest model has 16,000."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is, and how it is stored."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    start: int
    size: int
    checksum: int
    in_slices: bool


def _entry(data: bytes) -> _Entry:
    """From a BundleEntryProto."""
    fields = _message(data)
    shape = _message(_nested(fields, 2))
    return _Entry(
        dtype=_integer(fields, 1),
        shape=tuple(_integer(_message(_bytes(size)), 1) for size in shape.get(2, ())),
        shard=_integer(fields, 3),
        start=_integer(fields, 4),
        size=_integer(fields, 5),
        checksum=_integer(fields, 6),
        in_slices=7 in fields,
    )


def _check_apart(named: Mapping[str, _Entry], index: Path) -> None:
    """Raises SourceError if two tensors use the same bytes: a small file could have many."""
    ends: dict[int, int] = {}
    for name, entry in sorted(named.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start < ends.get(entry.shard, 0):
            raise gptk.SourceError(f"{index} is damaged: the tensor {name} overlaps another one")
        ends[entry.shard] = entry.start + entry.size


def _read(name: str, entry: _Entry, file: MappedFile) -> Tensor:
    """The tensor that an entry describes, with its checksum verified."""
    what = f"{file.name}: the tensor {name}"
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None or entry.in_slices:
        stored = "in slices" if entry.in_slices else f"as TensorFlow's type {entry.dtype}"
        raise gptk.SourceError(f"{what} is stored {stored}, which is not supported; floats are")
    if not entry.size or entry.size != math.prod(entry.shape) * dtype.itemsize:
        raise gptk.SourceError(
            f"{what} has {entry.size:,} bytes, which its shape {shown(entry.shape)} does not fit"
        )
    tensor = file.numbers(entry.start, entry.size, dtype)
    if _checksum(tensor.view(torch.uint8).numpy()) != entry.checksum:
        raise gptk.SourceError(f"{what} is damaged: its checksum is wrong")
    return tensor.view(entry.shape)


def _checksum(data: Any) -> int:
    """The masked CRC-32C of bytes."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


# --- Tables ----------------------------------------------------------------------------------


def _table(data: bytes, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table. Raises ValueError or IndexError if it is inconsistent."""
    if len(data) < _FOOTER or data[-8:] != _MAGIC:
        raise gptk.SourceError(
            f"{path} is cut short, or no index of TensorFlow's: it does not end with the bytes "
            f"{_MAGIC.hex()}"
        )
    footer = data[-_FOOTER:]
    metaindex, end = _handle(footer, 0)
    for _ in _block(data, *metaindex, path):
        pass  # its content is not needed, but its checksum is verified
    index, _ = _handle(footer, end)
    before, last = 0, None
    for _, value in _block(data, *index, path):
        (start, size), _ = _handle(value, 0)
        # Each block once, and each key after the one before it, as the format asks for.
        if start < before:
            raise ValueError("two blocks overlap")
        before = start + size
        for key, item in _block(data, start, size, path):
            if last is not None and key <= last:
                raise ValueError("the keys are not in order")
            last = key
            yield key, item


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """A block's (start, size), and the position after this handle."""
    start, position = _varint(data, position)
    size, position = _varint(data, position)
    return (start, size), position


def _block(data: bytes, start: int, size: int, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block. A key is stored as the length of the prefix that it shares with the
    key before, and the rest."""
    end = start + size
    if end + _TRAILER > len(data):
        raise ValueError("the block is not within the file")
    (crc,) = struct.unpack_from("<I", data, end + 1)
    if _checksum(data[start : end + 1]) != crc:
        raise gptk.SourceError(f"{path} is damaged: the checksum of a block is wrong")
    if data[end]:
        raise gptk.SourceError(
            f"{path} has compressed blocks (kind {data[end]}), which are not supported; "
            "TensorFlow's Saver writes none"
        )
    block = data[start:end]
    # At the end are the positions of keys that are stored whole, for searching, and their count.
    (n_restarts,) = struct.unpack_from("<I", block, size - 4)
    last = size - 4 - 4 * n_restarts
    position, key = 0, b""
    while position < last:
        shared, position = _varint(block, position)
        n_key, position = _varint(block, position)
        n_value, position = _varint(block, position)
        if shared > len(key) or position + n_key + n_value > last:
            raise ValueError("an entry is not within its block")
        if shared + n_key > _MAX_KEY:
            raise ValueError("a key is too long")
        key = key[:shared] + block[position : position + n_key]
        position += n_key + n_value
        yield key, block[position - n_value : position]


# --- Protocol buffers ------------------------------------------------------------------------

_Message = dict[int, list[int | bytes]]
"""The values of each field, by its number: integers, or bytes (strings and nested messages)."""


_FIXED = {1: 8, 5: 4}
"""The bytes of numbers of a fixed size, by wire type."""


def _message(data: bytes) -> _Message:
    fields: _Message = {}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        value: int | bytes
        if wire_type == 0:
            value, position = _varint(data, position)
        else:
            if wire_type == 2:
                size, position = _varint(data, position)
            else:
                size = _FIXED.get(wire_type, len(data) + 1)
            value = data[position : position + size]
            if len(value) < size:
                raise IndexError("the field goes beyond the message")
            position += size
            if wire_type != 2:
                value = int.from_bytes(value, "little")
        fields.setdefault(number, []).append(value)
    return fields


def _integer(message: _Message, number: int) -> int:
    """A field that is not repeated; 0 if it is absent."""
    value = message.get(number, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("a number is expected")
    return value


def _nested(message: _Message, number: int) -> bytes:
    """A nested message that is not repeated; an empty one if it is absent."""
    return _bytes(message.get(number, [b""])[-1])


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a string or message is expected")
    return value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in base 128, low digits first, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):  # 64 bits, seven in each byte
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number has more than 64 bits")
