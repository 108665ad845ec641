"""gptk's own kernels, the C++ code in the folder cpp: compiled once on a machine, then loaded.

PyTorch's kernels for quantized weights are bound by arithmetic on CPUs with AVX-512: they read
SmolLM2's int4 layers at 16 GB/s where the memory gives 31. gptk's read them at 31. They need Linux,
a processor with AVX-512 and VNNI, and a C++ compiler: g++, or the one that $CXX names. Without
these, PyTorch's operations are used.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from gptk.system.compiled_code import Code, load_or_make
from gptk.system.threads import use_threads_that_start

FEW_QUERIES = 16
"""The most queries of a key head over a cache that the kernel of `attend` takes. With more,
PyTorch's attention is faster."""

_log = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("cpp")
_NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni", "f16c", "fma3")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    *("-ffp-contract=off", "-DGPTK_AVX512"),
    f"-DGPTK_MAX_QUERIES={FEW_QUERIES}",
)
_PATIENCE = 180.0
"""Seconds that the compiler may take. It takes five to ten."""

_loaded: ctypes.CDLL | str | None = None
"""See `load`."""
_lock = threading.Lock()


class _UnusableCompilerError(Exception):
    """Why the kernels cannot be compiled."""


def library() -> ctypes.CDLL:
    """The kernels. They must be available: see `load`."""
    loaded = _loaded if _loaded is not None else load()
    if isinstance(loaded, str):
        raise RuntimeError(f"gptk's kernels do not run here: {loaded}")
    return loaded


def load() -> ctypes.CDLL | str:
    """The kernels, compiled if this machine has not done so yet; or why they cannot run.

    The first call decides. Threads that call at the same time wait for it.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> ctypes.CDLL | str:
    if sys.platform != "linux":
        return "they need Linux and an x86 processor with AVX-512"
    capabilities = torch.cpu.get_capabilities()
    if missing := [name for name in _NEEDED if not capabilities.get(name)]:
        return f"this processor lacks {', '.join(_words(name) for name in missing)}"
    flags = (*_FLAGS, "-mavx512bf16") if capabilities.get("avx512_bf16") else _FLAGS
    try:
        compiler = _compiler()
        sources = [path.read_bytes() for path in sorted(_SOURCES.iterdir())]
        origin = {
            "sources": hashlib.sha256(b"\0".join(sources)).hexdigest(),
            "compiler": f"{shlex.join(compiler)}, {_identity(compiler[0])}",
            "flags": shlex.join(flags),
            "libraries": f"torch {torch.__version__}, {os.confstr('CS_GNU_LIBC_VERSION')}",
        }
        use_threads_that_start()
        code = Code("kernels", ".so", origin, lambda path: _compile([*compiler, *flags], path))
        return load_or_make(code, _open)
    except PermissionError as error:
        return f"{error}; name a folder of your own in $GPTK_CACHE"
    except (_UnusableCompilerError, OSError, AttributeError) as error:
        return _printable(str(error))


def _words(capability: str) -> str:
    """The name that people know a capability of PyTorch's list by: AVX-512 VNNI for avx512_vnni."""
    return capability.upper().replace("AVX512_F", "AVX-512").replace("AVX512_", "AVX-512 ")


def _printable(text: str) -> str:
    """A line of a compiler's, fit to be shown."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300]


def _compiler() -> list[str]:
    """The compiler's command: that of $CXX, else g++."""
    named = os.environ.get("CXX", "")
    try:
        command = shlex.split(named) or ["g++"]
    except ValueError as error:  # a quotation without an end
        message = f"$CXX is {named}, which is no command: {error}"
        raise _UnusableCompilerError(message) from None
    program = shutil.which(command[0])
    if program is None and named.strip():
        raise _UnusableCompilerError(f"$CXX names a C++ compiler that is not there: {command[0]}")
    if program is None:
        raise _UnusableCompilerError(
            "there is no C++ compiler; install g++, or name another one in $CXX"
        )
    return [program, *command[1:]]


def _identity(program: str) -> str:
    """A text that changes when a program is replaced by another version."""
    path = Path(program).resolve()
    status = path.stat()
    return f"{path}, {status.st_size} bytes of {status.st_mtime_ns}"


def _compile(compiler: list[str], path: Path) -> None:
    """Compile the sources into a shared library at `path`, in a folder that has room for more."""
    level = logging.INFO
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        if sys.stderr and sys.stderr.isatty():
            level = logging.WARNING  # somebody waits
    _log.log(level, "compiling gptk's kernels for this machine, once: some ten seconds")
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [str(path.with_name(f"{source.stem}.o")) for source in sources]
    deadline = time.monotonic() + _PATIENCE
    _run(
        [
            [*compiler, "-c", str(source), "-o", object]
            for source, object in zip(sources, objects, strict=True)
        ],
        path.parent,
        deadline,
    )
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    _run([[*compiler, *objects, *libraries, "-o", str(path)]], path.parent, deadline)
    if not path.is_file():
        raise _UnusableCompilerError(f"{compiler[0]} writes no file")


def _run(commands: list[list[str]], folder: Path, deadline: float) -> None:
    """Run commands of a compiler at the same time, with their output in a folder.

    Raises _UnusableCompilerError if one fails, or is not done by the deadline.
    """
    # Messages in English; temporary files where there is room for the result, too.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)}
    output = folder / "output"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with output.open("wb") as stream:
            for command in commands:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=stream,
                        env=environment,
                        start_new_session=True,
                    )
                )
        codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        message = f"{commands[0][0]} was not done after {_PATIENCE:.0f} s"
        raise _UnusableCompilerError(message) from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the programs that it has started
                process.wait()
    if any(codes):
        ended = next(code for code in codes if code)
        reason = _first_error(output) or f"it ends with {ended} and says nothing"
        raise _UnusableCompilerError(f"{commands[0][0]} cannot compile them: {reason}")


def _first_error(output: Path) -> str:
    """The first line of a compiler's output that speaks of an error, else the first line."""
    with output.open(encoding="utf-8", errors="replace") as stream:
        lines = [line.strip() for line in stream.read(1 << 20).splitlines()]
    errors = [line for line in lines if "error" in line.lower()]
    return next((line for line in (*errors, *lines) if line), "")


def _open(path: Path) -> ctypes.CDLL:
    """Load the shared library and declare what its functions take. They return a Status.

    Raises OSError if it is none, and AttributeError if it lacks one of them.
    """
    # With global symbols, so that programs compiled by AOTInductor find them.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    flag, real, double = ctypes.c_int, ctypes.c_float, ctypes.c_double
    data, size = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, list[Any]] = {
        "gptk_quantized_linear": [flag, flag, *[data] * 4, *[size] * 3],
        "gptk_linear": [flag, *[data] * 4, *[size] * 3],
        "gptk_pack": [flag, *[data] * 4, *[size] * 2],
        "gptk_dequantize": [flag, *[data] * 4, size],
        "gptk_dequantize_packed": [flag, flag, data, data, size, size],
        "gptk_product": [
            *(data, size, flag),
            *(flag, data, size, flag),
            *(flag, data, size, data, flag, *[size] * 3),
        ],
        "gptk_column_sums": [flag, data, data, size, size],
        "gptk_cross_entropy": [flag, data, data, data, real, *[size] * 3],
        "gptk_rms_norm": [flag, data, data, real, data, size, size],
        "gptk_layer_norm": [flag, *[data] * 3, real, data, size, size],
        "gptk_linear_in_panels": [flag, *[data] * 4, *[size] * 3],
        "gptk_convert_panels": [flag, flag, data, data, size, size],
        "gptk_walk": [data, data],
        "gptk_swiglu": [flag, data, data, size, size],
        "gptk_gelu": [flag, data, data, data, size],
        "gptk_rotate": [flag, *[data] * 4, *[size] * 3],
        "gptk_exponential": [data, flag, data, data, size],
        "gptk_softmax_sums": [*[data] * 4, size, size],
        "gptk_last_key": [data, data, double, data, size, size],
        "gptk_keep_from": [*[data] * 4, size, size],
        "gptk_top": [*[data] * 4, *[size] * 3],
        "gptk_draw": [*[data] * 4, size, size],
        "gptk_permutation": [*[size] * 3, data],
        "gptk_attend_causally": [flag, *[data] * 5, real, *[size] * 9],
        "gptk_attend_causally_backward": [*[data] * 9, real, *[size] * 9],
        "gptk_attend_blocks": [flag, *[data] * 5, *[size] * 8],
        "gptk_attend": [flag, *[data] * 5, real, *[size] * 10],
    }
    for name, types in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int32
    return library
