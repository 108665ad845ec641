"""Reading and comparing stored tensors, for several loaders; the files of torch.save apart."""

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor

import gptk
from gptk.plugins import parse_json
from gptk_plugins.mapped_file import MappedFile

State = TypeVar("State", bound=MutableMapping[str, Any])
Matrix = TypeVar("Matrix", Tensor, gptk.Levels)


@contextlib.contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Put the source in front of a SourceError's message that does not know it."""
    try:
        yield
    except gptk.SourceError as error:
        raise gptk.SourceError(f"{source}: {error}") from None


def tie_equal_head(config: gptk.GPTConfig, state: State) -> tuple[gptk.GPTConfig, State]:
    """Tie the head to the embedding if both were stored and are equal."""
    if not config.tied_head and _equal(state["embed.weight"], state["head.weight"]):
        del state["head.weight"]
        config = replace(config, tied_head=True)
    return config, state


def _equal(first: Tensor | gptk.Levels, second: Tensor | gptk.Levels) -> bool:
    if first.shape != second.shape:
        return False
    if isinstance(first, gptk.Levels) and isinstance(second, gptk.Levels):
        return all(a.equals(b) for a, b in _rows_of_both(first, second))
    if isinstance(first, gptk.Levels) or isinstance(second, gptk.Levels):
        return False
    return all(torch.equal(a, b) for a, b in _rows_of_both(first, second))


def _rows_of_both(first: Matrix, second: Matrix) -> Iterator[tuple[Matrix, Matrix]]:
    """Some rows of two matrices at a time: different ones are found out by the first."""
    for start in range(0, first.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        yield first[rows], second[rows]


_ROWS = 256


def safetensors_readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a safetensors file. Raises SourceError.

    The library checks the file: that the tensors fill it, none overlaps, and each has the size of
    its shape. The tensors are mapped here, as the library maps the whole file for each.
    """
    file = MappedFile(path)
    (length,) = struct.unpack("<Q", file.file.read(8).ljust(8, b"\0"))
    if length > min(_MAX_HEADER, file.size):
        raise gptk.SourceError(
            f"{path} is cut short or damaged: its header would have {length:,} bytes"
        )
    try:
        header = file.file.read(length).decode("utf-8")
        with safetensors.safe_open(file.path, framework="pt"):
            pass
    except (ValueError, safetensors.SafetensorError) as error:
        raise gptk.SourceError(f"{path} is cut short or damaged: {error}") from None
    entries = parse_json(header, f"the header of {path}")
    entries.pop("__metadata__", None)
    start = 8 + length
    return {
        name: partial(_read, file, f"{path}: the tensor {name}", start, entry)
        for name, entry in entries.items()
    }


def _read(file: MappedFile, what: str, start: int, entry: Mapping[str, Any]) -> Tensor:
    """The tensor that an entry of a safetensors header describes."""
    begin, end = entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise gptk.SourceError(f"{what} is stored as {entry['dtype']}, which is not supported")
    return file.numbers(start + begin, end - begin, dtype).view(entry["shape"])


_MAX_HEADER = 1 << 24
"""Bytes; that of a model of a thousand layers has two million."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "C64": torch.complex64,
}


def dtype_names(tensors: Iterable[Tensor]) -> str:
    """The dtypes of tensors, for display: `bfloat16, float32`."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
