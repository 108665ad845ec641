"""Memory: recognizing that it ran out, keeping what was freed, huge pages for weights."""

import contextlib
import ctypes
import errno
import math
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptk.errors import OutOfMemory
from gptk.system.control_groups import memory_left

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated or mapped.

    Python and NumPy raise MemoryError, the system's calls OSError, PyTorch OutOfMemoryError on a
    GPU and a bare RuntimeError on a CPU, of which only the message tells.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes do not fit"))
    (True, False)
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return (
        isinstance(error, MemoryError | OutOfMemory)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and bool(_ALLOCATION_FAILED.search(str(error))))
    )


@contextlib.contextmanager
def explaining_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Raise OutOfMemory where memory runs out in the block: a line of `what`, how many bytes were
    asked for where the error tells, and `remedy`.

    what: the subject of a sentence, such as `the model m.gguf`. An OutOfMemory that was explained
    further inside passes unchanged.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = _ASKED_FOR.search(str(error))
        last = f": the last piece takes {int(asked[1] or asked[2]):,} bytes" if asked else ""
        raise OutOfMemory(f"{what} needs more memory than there is{last}; {remedy}") from error


_ALLOCATION_FAILED = re.compile(
    "DefaultCPUAllocator|Cannot allocate memory|std::bad_alloc|out of memory|ALLOC_FAILED"
)
_ASKED_FOR = re.compile(r"allocate (\d+) bytes|mmap (\d+) bytes")


def physical_memory() -> float:
    """The bytes of memory that this machine has; infinite where the system does not tell."""
    if not hasattr(os, "sysconf"):  # on Windows
        return math.inf
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def available_memory(device: "torch.device") -> float:
    """About how many bytes of memory can be taken on a device."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
        free = 1024.0 * int(next(kilobytes))
    except (OSError, StopIteration, ValueError):  # not Linux
        free = min(physical_memory(), _UNKNOWN) / 2
    return float(min(free, memory_left(), _address_space()))


def _address_space() -> float:
    """The bytes that a limit of this process (RLIMIT_AS) leaves, or infinity."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return math.inf
        return float(limit - int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE)
    except (ImportError, OSError, ValueError):
        return math.inf


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


def new_bytes(*shape: int) -> "Tensor":
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


def new_zeros(shape: Sequence[int], dtype: "torch.dtype", device: "torch.device") -> "Tensor":
    """A tensor of zeros in memory of its own, which goes back to the system with the tensor.

    glibc would keep what is freed of this size. On a CPU memory is taken when it is written to.
    """
    import torch

    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size, **_PRIVATE), dtype=dtype).view(shape)


class _Arena:
    """A block of memory from which tensors are taken one after the other."""

    def __init__(self, size: int) -> None:
        import torch  # not at the top: an error is recognized without it

        memory = mmap.mmap(-1, size, **_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.free = self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._populated = 0

    def take(self, count: int) -> "Tensor":
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


_UNKNOWN = 8 << 30  # bytes
_PAGE = 4096
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h
_MADV_POPULATE_WRITE = 23  # from mman.h

_ARENA = 32 << 20  # bytes
_HUGE = 2 << 20  # bytes of a huge page
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
_arenas: list[_Arena] = []
_lock = threading.Lock()
