"""gptk's own kernels, the C++ code in the folder cpp: compiled once on a machine, then loaded.

PyTorch's kernels for quantized weights are bound by arithmetic on CPUs with AVX-512: they read
SmolLM2's int4 layers at 16 GB/s where the memory gives 31. gptk's read them at 31. They need Linux,
a processor with AVX-512 and VNNI, and a C++ compiler: g++, or the one that $CXX names. Without
these, PyTorch's operations are used.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gptk.system.caches import cache_folder

_SOURCES = Path(__file__).with_name("cpp")
_NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni", "f16c", "fma3")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
)


def library() -> ctypes.CDLL:
    """The kernels. They must be available: see `load`."""
    loaded = load()
    assert not isinstance(loaded, str), loaded
    return loaded


@functools.cache
def load() -> ctypes.CDLL | str:
    """The kernels, compiled if this machine has not done so yet; or why they cannot run."""
    if sys.platform != "linux":
        return "they need Linux and an x86 processor with AVX-512"
    capabilities = torch.cpu.get_capabilities()
    if missing := [name for name in _NEEDED if not capabilities.get(name)]:
        return f"this processor lacks {', '.join(_words(name) for name in missing)}"
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        return "there is no C++ compiler; install g++, or name one in $CXX"
    flags = (*_FLAGS, "-mavx512bf16") if capabilities.get("avx512_bf16") else _FLAGS
    sources = [path.read_text() for path in sorted(_SOURCES.iterdir())]
    key = (*sources, torch.__version__, compiler, *flags)
    path = cache_folder() / f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so"
    with contextlib.suppress(OSError):
        return _open(path)  # raises OSError if the file is missing or damaged
    try:
        _compile([*shlex.split(compiler), *flags], path)
        return _open(path)
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile them: {_first_error(error.stderr) or error}"
    except OSError as error:
        return str(error)


def _words(capability: str) -> str:
    """The name that people know a capability of PyTorch's list by: AVX-512 VNNI for avx512_vnni."""
    return capability.upper().replace("AVX512_F", "AVX-512").replace("AVX512_", "AVX-512 ")


def _first_error(output: bytes) -> str:
    """The first line of a compiler's output that speaks of an error, else the first line."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines()]
    errors = [line for line in lines if "error" in line.lower()]
    return next((line for line in (*errors, *lines) if line), "")


def _compile(compiler: list[str], path: Path) -> None:
    """Compile the sources into a shared library and put it at `path`, atomically."""
    if sys.stderr and sys.stderr.isatty():
        print("gptk: compiling its kernels for this machine, once…", file=sys.stderr)
    torch_libraries = Path(torch.__file__).parent / "lib"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as pool:

        def run(*arguments: str) -> None:
            subprocess.run([*compiler, *arguments], check=True, capture_output=True)

        objects = {str(source): f"{folder}/{source.stem}.o" for source in _SOURCES.glob("*.cpp")}
        list(pool.map(lambda files: run("-c", files[0], "-o", files[1]), objects.items()))
        new = Path(folder) / path.name
        run(*objects.values(), f"-L{torch_libraries}", "-ltorch_cpu", "-o", str(new))
        new.replace(path)


def _open(path: Path) -> ctypes.CDLL:
    """Load the shared library and declare what its functions take. They return nothing."""
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
        "gptk_swiglu": [flag, data, data, size, size],
        "gptk_gelu": [flag, data, data, data, size],
        "gptk_rotate": [flag, *[data] * 4, *[size] * 3],
        "gptk_exponential": [data, size, data, data, size],
        "gptk_softmax_sums": [*[data] * 4, size, size],
        "gptk_last_key": [data, data, double, data, size, size],
        "gptk_keep_from": [*[data] * 4, size, size],
        "gptk_top": [*[data] * 4, *[size] * 3],
        "gptk_draw": [*[data] * 4, size, size],
        "gptk_permutation": [*[size] * 3, data],
        "gptk_attend_causally": [flag, *[data] * 5, real, *[size] * 9],
        "gptk_attend_causally_backward": [*[data] * 9, real, *[size] * 9],
        "gptk_attend": [flag, *[data] * 5, real, *[size] * 10],
    }
    for name, types in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
