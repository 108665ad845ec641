"""The threads that PyTorch and gptk's kernels compute with."""

import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence

import torch

_log = logging.getLogger(__name__)


def use_threads_that_start() -> None:
    """Have PyTorch use no more threads than this process may start; a line in the log says so.

    Its threads start with the first operation that uses them. Should one of them not start, for
    want of memory or by a limit of the system, OpenMP ends the process. So they are tried before.
    """
    wanted = torch.get_num_threads()
    threads: list[threading.Thread] = []
    done = threading.Event()
    try:
        for _ in range(wanted - 1):
            thread = threading.Thread(target=done.wait)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        torch.set_num_threads(len(threads) + 1)
        _log.warning("of %d threads the system starts %d; these are used", wanted, len(threads) + 1)
    finally:
        done.set()
        for thread in threads:
            thread.join()


def share_openmp() -> None:
    """Let libraries that are loaded from now on call the OpenMP library that PyTorch uses.

    They leave its functions undefined, whatever file it is: each distribution of PyTorch has its
    own. A second OpenMP library would start threads of its own, and both would fight for the
    processors. Raises OSError if PyTorch has no such library.
    """
    name = "__kmpc_fork_call" if sys.platform == "darwin" else "GOMP_parallel"
    everywhere = ctypes.CDLL(None)
    if hasattr(everywhere, name):
        return  # PyTorch has made it global itself, as it does on Linux
    found = openmp_of(torch._C.__file__, name)
    if found is None:
        raise OSError("PyTorch has no OpenMP library here whose threads they could share")
    ctypes.CDLL(found, mode=ctypes.RTLD_GLOBAL)


def openmp_of(path: str, name: str) -> str | None:
    """The file of the loaded library that has a function, among all that a library depends on."""
    function = getattr(ctypes.CDLL(path), name, None)
    if function is None:
        return None
    found = _Symbol()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Symbol)]
    if not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(found)):
        return None
    return os.fsdecode(found.file)


class _Symbol(ctypes.Structure):
    """The C library's Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def release_threads() -> None:
    """End the threads that compute for the calling thread, which gets new ones when it needs them.

    OpenMP keeps a team of threads for each thread that has computed something. GNU's, which
    PyTorch has on Linux, counts them all: where these are more than the processors, threads no
    longer wait for each other awake but asleep, which makes small operations twice as slow. So a
    thread that leaves the computing to another one releases its own.
    """
    for pause in _pauses():
        pause(_SOFT)


@functools.cache
def _pauses() -> Sequence[Callable[[int], int]]:
    """`omp_pause_resource_all` of each GNU OpenMP in this process."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    except OSError:
        return []  # another system
    pauses: list[Callable[[int], int]] = []
    for path in sorted(paths):
        with contextlib.suppress(OSError, AttributeError):
            pauses.append(ctypes.CDLL(path).omp_pause_resource_all)
    return pauses


_SOFT = 1
"""OpenMP's omp_pause_soft: the settings of the calling thread are kept."""
