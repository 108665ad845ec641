"""TensorFlow's checkpoint files, the "tensor bundle": NAME.index and NAME.data-00000-of-00001, …

The index is a table as LevelDB has them (google/leveldb, doc/table_format.md), from a tensor's
name to a protocol buffer that says where it lies in which data file (tensorflow,
core/protobuf/tensor_bundle.proto). Blocks of the table and tensors carry a CRC-32C, rotated and
offset ("masked"); all of them are checked, by google-crc32c at 10 GB/s.
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
_TRAILER = 5  # of a block: a byte for its compression, and its checksum
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


def read_bundle(prefix: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a checkpoint; `prefix` is its path without `.index`.

    The data files are mapped, not read. Raises SourceError, now or when a tensor is read, for a
    file that is missing, cut short, damaged, or of a kind that is not supported.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    try:
        entries = {key: _message(value) for key, value in _table(_map(index), index)}
        header = entries.pop(b"")
        n_shards = _one(header, 1)
        if _one(header, 2):
            raise gptk.SourceError(f"{index} is of a big-endian machine, which is not supported")
        named = {key.decode(): entry for key, entry in entries.items()}
        shards = {_one(entry, 3) for entry in named.values()}
    except (KeyError, IndexError, TypeError, ValueError, struct.error):
        raise gptk.SourceError(f"{index} is damaged: it is not an index of tensors") from None
    paths = {
        one: prefix.with_name(f"{prefix.name}.data-{one:05}-of-{n_shards:05}") for one in shards
    }
    data = {one: _map(path) for one, path in paths.items()}
    return {
        name: partial(_read, name, entry, data[_one(entry, 3)], paths[_one(entry, 3)])
        for name, entry in named.items()
    }


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Copy on write: tensors made of the mapping may be written to, the file never is.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise gptk.SourceError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise gptk.SourceError(f"{path} cannot be read: {error}") from None


def _read(name: str, entry: "_Message", data: mmap.mmap, path: Path) -> Tensor:
    """The tensor that a BundleEntryProto describes, checked."""
    what = f"{path}: the tensor {name}"
    dtype = _DTYPES.get(_one(entry, 1))
    if dtype is None or 7 in entry:
        stored = "in slices" if 7 in entry else f"as TensorFlow's type {_one(entry, 1)}"
        raise gptk.SourceError(f"{what} is stored {stored}, which is not supported; floats are")
    shape = [_one(_message(size), 1) for size in _message(_one(entry, 2, b"")).get(2, ())]
    offset, size = _one(entry, 4), _one(entry, 5)
    if not size or size != math.prod(shape) * dtype.itemsize:
        raise gptk.SourceError(f"{what} has {size:,} bytes, which its shape {shape} does not fit")
    if offset + size > len(data):
        raise gptk.SourceError(
            f"{what} ends at byte {offset + size:,}; the file is cut short at {len(data):,}"
        )
    raw = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=offset)
    if _checksum(raw.numpy()) != _one(entry, 6):
        raise gptk.SourceError(f"{what} is damaged: its checksum is another")
    aligned = raw if offset % dtype.itemsize == 0 else raw.clone()
    return aligned.view(dtype).view(shape)


def _checksum(data: Any) -> int:
    """The masked CRC-32C of some bytes."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


# --- Tables ----------------------------------------------------------------------------------


def _table(data: mmap.mmap, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table. ValueError or IndexError where it contradicts itself."""
    if len(data) < _FOOTER or data[-8:] != _MAGIC:
        raise gptk.SourceError(
            f"{path} is cut short, or no index of TensorFlow's: it does not end with the bytes "
            f"{_MAGIC.hex()}"
        )
    footer = data[-_FOOTER:]
    metaindex, at = _handle(footer, 0)
    for _ in _block(data, *metaindex, path):
        pass  # it has nothing to tell, but may be damaged, too
    index, _ = _handle(footer, at)
    for _, handle in _block(data, *index, path):
        yield from _block(data, *_handle(handle, 0)[0], path)


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Where a block lies, as (start, size), and where its handle ends."""
    start, at = _varint(data, at)
    size, at = _varint(data, at)
    return (start, size), at


def _block(data: mmap.mmap, start: int, size: int, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block: each key as what it shares with the one before, and the rest."""
    end = start + size
    if end + _TRAILER > len(data):
        raise ValueError("the block is not within the file")
    (crc,) = struct.unpack_from("<I", data, end + 1)
    if _checksum(data[start : end + 1]) != crc:
        raise gptk.SourceError(f"{path} is damaged: the checksum of a block is another")
    if data[end]:
        raise gptk.SourceError(
            f"{path} has compressed blocks (kind {data[end]}), which are not supported; "
            "TensorFlow's Saver writes none"
        )
    block = data[start:end]
    # At the end are the places where a key is whole, for searching, and their count.
    (n_restarts,) = struct.unpack_from("<I", block, size - 4)
    last = size - 4 - 4 * n_restarts
    at, key = 0, b""
    while at < last:
        shared, at = _varint(block, at)
        n_key, at = _varint(block, at)
        n_value, at = _varint(block, at)
        key = key[:shared] + block[at : at + n_key]
        at += n_key + n_value
        yield key, block[at - n_value : at]


# --- Protocol buffers ------------------------------------------------------------------------

_Message = dict[int, list[Any]]
"""The values of each field, by its number: integers, or bytes for what is nested."""


def _message(data: bytes) -> _Message:
    fields: _Message = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        value: int | bytes
        if wire_type == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
            value = data[at : at + size]
            if len(value) < size:
                raise IndexError("the field goes beyond the message")
            at += size
            if wire_type != 2:
                value = int.from_bytes(value, "little")
        fields.setdefault(number, []).append(value)
    return fields


def _one(message: _Message, number: int, default: Any = 0) -> Any:
    """The value of a field that is there once at most."""
    return message.get(number, [default])[-1]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in base 128, the low digits first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
