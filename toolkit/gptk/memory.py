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
        if not _chunks or count > len(_chunks[-1]):
            memory = mmap.mmap(-1, max(count, _CHUNK), **_PRIVATE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            # Only the last one is remembered: the others live as long as what is in them.
            _chunks[:] = [torch.frombuffer(memory, dtype=torch.uint8)]
        taken = _chunks[-1][:count]
        _chunks[-1] = _chunks[-1][count + -count % 64 :]
    return taken.view(shape)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h

_CHUNK = 32 << 20
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
_chunks: list[Tensor] = []
_lock = threading.Lock()
