"""Memory of the CPU: how a process keeps it, and in which pages."""

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

    A training step frees and takes gradients and activations of gigabytes. By default glibc
    gives large blocks back to the system, which then fills them with zeros, page by page: for
    GPT-2 124M 270,000 page faults and a sixth of the time of each step. Elsewhere than on Linux
    with glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def new_bytes(*shape: int) -> Tensor:
    """Memory for weights, uint8 on the CPU, in huge pages where Linux has them.

    Matrices that follow each other, each read once, are read a quarter faster so: with pages of
    4 KiB the processor looks up where a page is, and starts to read ahead anew, at each.
    """
    count = math.prod(shape)
    with _lock:
        if not _arenas or count > len(_arenas[-1].free):
            # Only the last one is remembered: the others live as long as what is in them.
            _arenas[:] = [_Arena(max(count, _ARENA))]
        return _arenas[-1].take(count).view(shape)


class _Arena:
    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size, **_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.free = self._all = torch.frombuffer(memory, dtype=torch.uint8)
        self._ready = 0

    def take(self, count: int) -> Tensor:
        taken = self.free[:count]
        self.free = self.free[count + -count % 64 :]
        # Left to the first writes, pages come one by one, and two threads that write wait for
        # each other: a tenth of the speed.
        used = len(self._all) - len(self.free)
        if used > self._ready and sys.platform == "linux":
            start = self._ready
            self._ready = min(used + -used % _HUGE, len(self._all))
            ctypes.CDLL(None).madvise(  # fails before Linux 5.14, and nothing is lost
                ctypes.c_void_p(self._all.data_ptr() + start),
                ctypes.c_size_t(self._ready - start),
                _MADV_POPULATE_WRITE,
            )
        return taken


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h
_MADV_POPULATE_WRITE = 23  # from mman.h

_ARENA = 32 << 20
_HUGE = 2 << 20
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
_arenas: list[_Arena] = []
_lock = threading.Lock()
