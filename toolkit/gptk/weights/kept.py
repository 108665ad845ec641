"""Packed weights in the cache folder, which the next loading of the same file maps.

To lay out the weights of a file of 663 MB takes 0.2 s of a core's time, but new memory for them may
take 1.5 s to get from the system. A file that is in the system's cache is mapped in 0.02 s, and in
huge pages on file systems that have them (ext4 from Linux 6.16 on), so that decoding is as fast.
Several processes share the memory.

Weights that were kept are used only if all of this is so:

- The folder and the file belong to the user, and nobody else can write them.
- They were made from a file of the same size, inode and times of change. ctime changes with every
  change, and unlike mtime nobody can set it back.
- They are whole: the CRC32C of each 8 MiB is right. That takes 0.05 s for 735 MB, an eighth of what
  SHA-256 takes. It guards against damage, not against people, who are kept out of the folder. For
  the same reason the model's file is not hashed: reading it would take longer than all the rest.
- The first and last outputs of each matrix, packed anew from the model's file, are the same. So
  another version of gptk, which might lay out or name matrices otherwise, packs them again.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
from torch import Tensor

from gptk.model.levels import Levels
from gptk.model.quantization import KernelGroups
from gptk.model.segments import Segments
from gptk.system.caches import cache_folder
from gptk.system.files import lock, new_file, remove_leftovers
from gptk.system.private_files import make_private, open_private

_log = logging.getLogger(__name__)

SMALLEST = 32 << 20
"""Bytes from which on packed weights are kept; fewer are packed as soon as mapped."""
LARGEST = 16 << 30
"""The most bytes that are kept, of all files together. The oldest are removed."""
_SHARE = 4
"""Nor are they more than the disk's free space and what is kept, divided by this."""
_SETTLED = 2e9
"""Nanoseconds for which a file must not have changed: then a later change gets another time."""
_CHUNK = 8 << 20
_END = struct.Struct("<8sII")
_MAGIC = b"gptkpack"
_MADV_POPULATE_READ = 22  # from mman.h


class KeptWeights:
    """The packed matrices of a model that is being loaded from a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._source = Source.of(file)
        self._kept = {} if self._source is None else _load(self._source)
        self._packed: dict[str, KernelGroups] = {}

    def pack(self, name: str, levels: Levels) -> KernelGroups:
        """The packed matrix, mapped if it was kept."""
        kept = self._kept.get(name)
        if kept is None or not kept.packs(levels):
            kept = KernelGroups(levels)
        self._packed[name] = kept
        return kept

    def keep(self) -> None:
        """Keep the matrices for the next time, if they are large enough and there is room."""
        source, packed = self._source, self._packed
        if source is None or source != Source.of(self._file):
            return
        if packed.keys() == self._kept.keys() and all(packed[x] is self._kept[x] for x in packed):
            with contextlib.suppress(OSError):
                os.utime(source.kept)  # what was used last is removed last
            return
        if sum(matrix.nbytes for matrix in packed.values()) < SMALLEST:
            return
        try:
            _keep(source, packed)
        except OSError as error:
            _log.info("packed weights are not kept: %s", error.strerror or error)


@dataclass(frozen=True)
class Source:
    """A file that weights are read from, as it is at a time."""

    stamp: tuple[int, int, int, int]
    """Its size in bytes, mtime and ctime in ns, inode."""

    @classmethod
    def of(cls, file: Path) -> Self | None:
        """None for what is no regular file, or has changed just now."""
        try:
            status = os.stat(file)
        except OSError:
            return None
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        if not stat.S_ISREG(status.st_mode) or time.time_ns() - changed < _SETTLED:
            return None
        return cls((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))

    @property
    def kept(self) -> Path:
        """Where its packed weights are kept, if they are."""
        return (
            kept_folder() / f"{hashlib.sha256(repr(self.stamp).encode()).hexdigest()[:32]}.packed"
        )


def kept_folder() -> Path:
    """The folder of all packed weights. It may be removed at any time."""
    return cache_folder() / "weights"


def kept_sizes() -> dict[Path, int]:
    """The files of packed weights and their sizes in bytes, those used last at the end."""
    found = []
    with contextlib.suppress(OSError):
        for path in kept_folder().glob("*.packed"):
            with contextlib.suppress(OSError):  # removed meanwhile
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_size))
    return {path: size for _, path, size in sorted(found)}


# --- Reading


def _load(source: Source) -> Mapping[str, KernelGroups]:
    """The matrices that were kept; none if there are none, or if they cannot be used."""
    path = source.kept
    if not path.exists():
        return {}
    try:
        if problem := make_private(path.parent):
            raise ValueError(problem)
        with open_private(path) as file:
            matrices = _read(file, source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("packed weights in %s are not used, and are made again: %s", path, error)
        return {}
    _log.info("packed weights mapped from %s", path)
    return matrices


def _read(file: IO[bytes], source: Source) -> dict[str, KernelGroups]:
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _END.size))
    end = file.read(_END.size)
    if len(end) < _END.size or not end.startswith(_MAGIC):
        raise ValueError("the file is cut short")
    _, length, check = _END.unpack(end)
    data_size = size - _END.size - length
    if data_size <= 0:
        raise ValueError("the file is cut short")
    file.seek(data_size)
    table = np.frombuffer(file.read(length), dtype=np.uint8)
    if _crc(0, table) != check:
        raise ValueError("its table is damaged")
    about = json.loads(table.tobytes())
    if about["source"] != list(source.stamp):
        raise ValueError("it was made from another file")
    data = _mapped(file, data_size)
    checks = [_crc(0, chunk.numpy()) for chunk in torch.split(data, _CHUNK)]
    if checks != about["chunks"]:
        raise ValueError("it is damaged")
    matrices = {}
    for name, (start, stored, inputs) in about["matrices"].items():
        segments = Segments.from_json(stored)
        stop = start + segments.packed_bytes(inputs)
        if not 0 <= start <= stop <= data_size:
            raise ValueError("its table is wrong")
        matrices[name] = KernelGroups.of_packed(data[start:stop], segments, inputs)
    return matrices


def _mapped(file: IO[bytes], size: int) -> Tensor:
    """The first bytes of a file, mapped copy-on-write, in huge pages where the system has them."""
    memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), _MADV_POPULATE_READ):
        if advice is not None and hasattr(memory, "madvise"):
            with contextlib.suppress(OSError, ValueError):  # a system that does not know it
                memory.madvise(advice)
    return torch.frombuffer(memory, dtype=torch.uint8)


# --- Writing


def _keep(source: Source, matrices: Mapping[str, KernelGroups]) -> None:
    """Write the file. Raises OSError."""
    path = source.kept
    if problem := make_private(path.parent):
        raise PermissionError(problem)
    locked = lock(path.parent / "lock")
    if locked is None:  # another process keeps weights
        return
    with locked:
        remove_leftovers(path.parent)
        size = sum(matrix.nbytes for matrix in matrices.values())
        if not _make_room(path, size):
            _log.info("packed weights are not kept: the disk has little room")
            return
        # Not synced to disk, which would take a second: damaged weights are found and not used.
        with new_file(path.parent, path.name) as new:
            new.path.chmod(0o600)
            _write(new.content, source, matrices)
            new.content.flush()
            new.path.replace(path)
    _log.info("packed weights kept in %s", path)


def _make_room(path: Path, size: int) -> bool:
    """Remove the oldest files, so that another of that size may be kept. Whether it may."""
    kept = kept_sizes()
    kept.pop(path, None)  # is replaced
    limit = min(LARGEST, (shutil.disk_usage(path.parent).free + sum(kept.values())) // _SHARE)
    if size > limit:
        return False
    for old in kept:
        if size + sum(kept_sizes().values()) <= limit:
            break
        old.unlink(missing_ok=True)
    return True


def _write(file: IO[bytes], source: Source, matrices: Mapping[str, KernelGroups]) -> None:
    table, start = {}, 0
    for name, matrix in matrices.items():
        table[name] = start, matrix.segments.to_json(), matrix.shape[1]
        start += matrix.nbytes
    checks = []
    # In whole chunks, for which the system takes huge pages.
    for pieces in _chunks(matrix.weights.numpy().reshape(-1) for matrix in matrices.values()):
        check = 0
        for piece in pieces:
            check = _crc(check, piece)
        checks.append(check)
        chunk = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        file.write(chunk.data)
    about = {"source": source.stamp, "chunks": checks, "matrices": table}
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    file.write(text.data)
    file.write(_END.pack(_MAGIC, len(text), _crc(0, text)))


def _chunks(arrays: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The arrays' bytes, in pieces that have _CHUNK bytes together; fewer at the end."""
    pieces: list[np.ndarray] = []
    missing = _CHUNK
    for array in arrays:
        rest = array
        while len(rest):
            pieces.append(rest[:missing])
            missing -= len(pieces[-1])
            rest = rest[len(pieces[-1]) :]
            if not missing:
                yield pieces
                pieces, missing = [], _CHUNK
    if pieces:
        yield pieces


def _crc(before: int, data: np.ndarray) -> int:
    import google_crc32c

    return int(google_crc32c.extend(before, data))
