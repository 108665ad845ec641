"""TensorFlow's checkpoint files, the "tensor bundle": NAME.index and NAME.data-00000-of-00001, …

The index is a table in LevelDB's format (google/leveldb, doc/table_format.md), from a tensor's name
to a protocol buffer with its data file and offset (tensorflow, core/protobuf/tensor_bundle.proto).
Each block of the table and each tensor has a CRC-32C, rotated and offset ("masked"); all are
checked, by google-crc32c at 10 GB/s.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

import gptk

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER = 48  # two block handles, padded, and the magic number
_TRAILER = 5  # after a block: a byte for its compression, and its checksum
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


def read_bundle(prefix: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a checkpoint. prefix: its path without `.index`.

    The data files are mapped, not read. Raises SourceError, now or when a tensor is read, for a
    file that is missing, cut short, damaged, or of a kind that is not supported.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    try:
        entries = {key: _message(value) for key, value in _table(_map(index), index)}
        header = entries.pop(b"")
        n_shards = _field(header, 1)
        if _field(header, 2):
            raise gptk.SourceError(f"{index} is of a big-endian machine, which is not supported")
        named = {key.decode(): entry for key, entry in entries.items()}
        shards = {_field(entry, 3) for entry in named.values()}
    except (KeyError, IndexError, TypeError, ValueError, struct.error):
        raise gptk.SourceError(f"{index} is damaged: it is not an index of tensors") from None
    paths = {
        shard: prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{n_shards:05}")
        for shard in shards
    }
    data = {shard: _map(path) for shard, path in paths.items()}
    return {
        name: partial(_read, name, entry, data[_field(entry, 3)], paths[_field(entry, 3)])
        for name, entry in named.items()
    }


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Copy on write: writing to a tensor of the mapping never changes the file.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise gptk.SourceError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise gptk.SourceError(f"{path} cannot be read: {error}") from None


def _read(name: str, entry: "_Message", data: mmap.mmap, path: Path) -> Tensor:
    """The tensor that a BundleEntryProto describes, with its checksum verified."""
    what = f"{path}: the tensor {name}"
    dtype = _DTYPES.get(_field(entry, 1))
    if dtype is None or 7 in entry:
        stored = "in slices" if 7 in entry else f"as TensorFlow's type {_field(entry, 1)}"
        raise gptk.SourceError(f"{what} is stored {stored}, which is not supported; floats are")
    shape = [_field(_message(size), 1) for size in _message(_field(entry, 2, b"")).get(2, ())]
    offset, size = _field(entry, 4), _field(entry, 5)
    if not size or size != math.prod(shape) * dtype.itemsize:
        raise gptk.SourceError(f"{what} has {size:,} bytes, which its shape {shape} does not fit")
    if offset + size > len(data):
        raise gptk.SourceError(
            f"{what} ends at byte {offset + size:,}; the file is cut short at {len(data):,}"
        )
    raw = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=offset)
    if _checksum(raw.numpy()) != _field(entry, 6):
        raise gptk.SourceError(f"{what} is damaged: its checksum is wrong")
    aligned = raw if offset % dtype.itemsize == 0 else raw.clone()
    return aligned.view(dtype).view(shape)


def _checksum(data: Any) -> int:
    """The masked CRC-32C of bytes."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


# --- Tables ----------------------------------------------------------------------------------


def _table(data: mmap.mmap, path: Path) -> Iterator[tuple[bytes, bytes]]:
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
    for _, handle in _block(data, *index, path):
        yield from _block(data, *_handle(handle, 0)[0], path)


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """A block's (start, size), and the position after this handle."""
    start, position = _varint(data, position)
    size, position = _varint(data, position)
    return (start, size), position


def _block(data: mmap.mmap, start: int, size: int, path: Path) -> Iterator[tuple[bytes, bytes]]:
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
        key = key[:shared] + block[position : position + n_key]
        position += n_key + n_value
        yield key, block[position - n_value : position]


# --- Protocol buffers ------------------------------------------------------------------------

_Message = dict[int, list[Any]]
"""The values of each field, by its number: integers, or bytes (strings and nested messages)."""


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
                size = {1: 8, 5: 4}[wire_type]
            value = data[position : position + size]
            if len(value) < size:
                raise IndexError("the field goes beyond the message")
            position += size
            if wire_type != 2:
                value = int.from_bytes(value, "little")
        fields.setdefault(number, []).append(value)
    return fields


def _field(message: _Message, number: int, default: Any = 0) -> Any:
    """The value of a field that is not repeated."""
    return message.get(number, [default])[-1]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in base 128, low digits first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
