"""The CPU's memory: keeping what was freed, and huge pages for weights."""

import contextlib
import ctypes
import math
import mmap
import sys
import threading

import torch
from torch import Tensor


def keep_freed_memory() -> None:
    """Have this process keep the memory it frees, for training on a CPU.

    A training step frees and allocates gigabytes of gradients and activations. By default glibc
    gives large blocks back to the system, which zeroes them page by page when they are allocated
    again: for GPT-2 124M that is 270,000 page faults and a sixth of the time of each step. Does
    nothing on systems other than Linux with glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def new_bytes(*shape: int) -> Tensor:
    """Memory for weights, uint8 on the CPU, in huge pages if Linux has them.

    Matrices in consecutive memory, each read once, are read a quarter faster with huge pages: with
    pages of 4 KiB the processor looks up an address and starts to prefetch anew at each page.
    """
    count = math.prod(shape)
    with _lock:
        if not _arenas or count > len(_arenas[-1].free):
            # Only the newest is kept here: an older one lives as long as the tensors in it.
            _arenas[:] = [_Arena(max(count, _ARENA))]
        return _arenas[-1].take(count).view(shape)


class _Arena:
    """A block of memory from which tensors are taken one after the other."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size, **_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.free = self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._populated = 0

    def take(self, count: int) -> Tensor:
        taken = self.free[:count]
        self.free = self.free[count + -count % 64 :]
        # Populate the pages now. By the first writes they would be allocated one by one, and two
        # writing threads would wait for each other: a tenth of the speed.
        used = len(self._memory) - len(self.free)
        if used > self._populated and sys.platform == "linux":
            start = self._populated
            self._populated = min(used + -used % _HUGE, len(self._memory))
            ctypes.CDLL(None).madvise(  # fails before Linux 5.14, which does no harm
                ctypes.c_void_p(self._memory.data_ptr() + start),
                ctypes.c_size_t(self._populated - start),
                _MADV_POPULATE_WRITE,
            )
        return taken


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h
_MADV_POPULATE_WRITE = 23  # from mman.h

_ARENA = 32 << 20  # bytes
_HUGE = 2 << 20  # bytes of a huge page
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
_arenas: list[_Arena] = []
_lock = threading.Lock()
