"""A file whose tensors are mapped one by one, so that each frees its memory when deleted."""

import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptk
from gptk.plugins import open_regular

if TYPE_CHECKING:  # PyTorch is not needed to read metadata
    import torch
    from torch import Tensor


class MappedFile:
    """A regular file that stays open and the same, even if another replaces it at its path.

    Raises SourceError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.name = path
        self.file = open_regular(path)
        self.size = os.fstat(self.file.fileno()).st_size

    @property
    def path(self) -> str:
        """A path that opens this very file, even if its name was reused."""
        by_descriptor = f"/dev/fd/{self.file.fileno()}"
        return by_descriptor if os.path.exists(by_descriptor) else str(self.name)

    def bytes(self, start: int, size: int) -> "Tensor":
        """`size` bytes from `start`, (size,) uint8: mapped copy-on-write, or read if they are few.

        The mapping lasts as long as tensors that use it. A single mapping of the whole file would
        keep every page that was read in memory, beside the tensors made from it. Raises SourceError
        if they are not all within the file.
        """
        import torch

        if start < 0 or size < 0 or start + size > self.size:
            raise gptk.SourceError(
                f"{self.name} is cut short at byte {self.size:,}; it should go on to "
                f"{start + size:,}"
            )
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        if size < _WORTH_MAPPING:
            self.file.seek(start)
            return torch.frombuffer(bytearray(self.file.read(size)), dtype=torch.uint8)
        before = start % mmap.ALLOCATIONGRANULARITY
        memory = _map(self.file.fileno(), start - before, before + size)
        return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=before)

    def numbers(self, start: int, size: int, dtype: "torch.dtype") -> "Tensor":
        """`size` bytes from `start` as numbers, (count,); mapped, or copied where they are not
        aligned as their type asks for."""
        raw = self.bytes(start, size)
        return (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype)


_WORTH_MAPPING = 1 << 16
"""A process may have only some 65,000 mappings, and each takes whole pages."""


def _map(descriptor: int, start: int, size: int) -> Any:
    """A private, writable mapping of a part of a file, as a buffer that unmaps it when deleted."""
    if sys.platform == "win32":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY, offset=start)
    # Python's own mapping keeps a file descriptor, of which a process has about a thousand.
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = library.mmap(None, size, protection, mmap.MAP_PRIVATE, descriptor, start)
    if address in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"unable to mmap {size} bytes: {os.strerror(number)}")
    buffer = (ctypes.c_uint8 * size).from_address(address)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    weakref.finalize(buffer, library.munmap, address, size).atexit = False
    return buffer
