"""Tensors in safetensors files: whole, or sharded over processes, each of which writes its parts.

    FILE.safetensors            all tensors, whole
    FOLDER/00000.safetensors    the parts of the first process, and so on; the file's metadata has,
                                as JSON, the whole shape and the offset of each part

Parts are sharded along the first axis, as FSDP2 does it. Whoever reads takes from each file what
overlaps with its own parts, so that the number of processes may be another one.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_PLACES = "gptk"
"""The key of the parts' places in a file's metadata."""


class _Place(pydantic.BaseModel):
    """Where in a tensor a part is."""

    shape: list[pydantic.NonNegativeInt]
    """Of the whole tensor."""
    offset: pydantic.NonNegativeInt
    """Where the part begins on the first axis."""


_Places = pydantic.TypeAdapter(dict[str, _Place])


def write_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, whole and on any device, to a file. Raises OSError or SafetensorError."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_parts(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write the parts of one process; of tensors that are not sharded the first process has all.

    Raises OSError or SafetensorError.
    """
    folder.mkdir(exist_ok=True)
    parts: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    for name, tensor in tensors.items():
        part, offset = _local_part(tensor)
        if part.numel() if _is_sharded(tensor) else rank == 0:
            parts[name] = part.contiguous()
            places[name] = {"shape": list(tensor.shape), "offset": offset}
    save_file(parts, folder / f"{rank:05d}.safetensors", {_PLACES: json.dumps(places)})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an opened file, or its parts in several."""

    name: str
    shape: list[int]
    dtype: torch.dtype
    parts: "list[_Part]"

    @torch.no_grad()
    def copy_into(self, target: Tensor) -> None:
        """Fill a tensor of the same shape, which may be sharded.

        Every process reads its own part and waits for no other.
        """
        local, start = _local_part(target)
        for part in self.parts:
            if not self.shape:
                local.copy_(part.file.get_tensor(self.name))
                continue
            low = max(start, part.offset)
            high = min(start + len(local), part.offset + part.length)
            if low < high:
                piece = part.file.get_slice(self.name)[low - part.offset : high - part.offset]
                local[low - start : high - start].copy_(piece)


@dataclass(frozen=True)
class _Part:
    """What a file has of a tensor."""

    file: Any
    """As safetensors has opened it; only what is asked for is read."""
    offset: int
    length: int
    """On the first axis; 1 for a scalar."""


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Mapping[str, StoredTensor]]:
    """The tensors in a file, or in a folder of files of parts, by their names.

    Raises ValueError if parts overlap, are missing or do not fit together, and SafetensorError or
    OSError for a file that is damaged or cannot be read.
    """
    sharded = source.is_dir()
    with contextlib.ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for path in sorted(source.glob("*.safetensors")) if sharded else [source]:
            file: Any = stack.enter_context(safe_open(path, framework="pt"))
            places = _read_places(file) if sharded else None
            for name in file.keys():  # noqa: SIM118 - it is no dict
                stored = file.get_slice(name)
                shape, dtype = stored.get_shape(), _dtype(stored.get_dtype(), name)
                place = _Place(shape=shape, offset=0)
                if places is not None:
                    place = places[name]
                tensor = tensors.setdefault(name, StoredTensor(name, place.shape, dtype, []))
                if (tensor.shape, tensor.dtype, shape[1:]) != (place.shape, dtype, place.shape[1:]):
                    raise ValueError(f"the parts of {name} do not fit together")
                tensor.parts.append(_Part(file, place.offset, shape[0] if shape else 1))
        for tensor in tensors.values():
            _check_cover(tensor)
        yield tensors


def _read_places(file: Any) -> dict[str, _Place]:
    """The place of each tensor of a file of parts."""
    try:
        places = _Places.validate_json((file.metadata() or {}).get(_PLACES, ""), strict=True)
    except pydantic.ValidationError:
        places = {}
    if places.keys() != set(file.keys()):
        raise ValueError("a file of shards does not say where its tensors belong")
    return places


def _check_cover(tensor: StoredTensor) -> None:
    """Raise ValueError unless the parts make up the tensor, without overlaps."""
    end = 0
    for part in sorted(tensor.parts, key=lambda part: part.offset):
        if part.offset != end:
            raise ValueError(f"parts of {tensor.name} are missing or overlap")
        end += part.length
    if end != (tensor.shape[0] if tensor.shape else 1):
        raise ValueError(f"parts of {tensor.name} are missing or overlap")


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def _dtype(name: str, tensor: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{tensor} has the type {name}; types: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _is_sharded(tensor: Tensor) -> bool:
    if not hasattr(tensor, "full_tensor"):
        return False
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    return tensor.placements == (Shard(0),)


def _local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's part of a tensor, and where it begins on the first axis.

    A tensor that is not sharded along that axis is whole in every process.
    """
    if not _is_sharded(tensor):
        return whole(tensor), 0
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    # As torch.chunk divides: parts of equal length, but for the last ones.
    size = math.ceil(tensor.shape[0] / tensor.device_mesh.size())
    offset = min(tensor.device_mesh.get_local_rank() * size, tensor.shape[0])
    return tensor.to_local(), offset


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding; every process must call it."""
    gather = getattr(tensor, "full_tensor", None)  # only sharded tensors (DTensor) have it
    return tensor if gather is None else gather()
