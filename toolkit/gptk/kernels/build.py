"""gptk's own kernels, in the folder cpp: compiled once by the machine's compiler, and kept.

PyTorch's kernels for quantized weights are bound by arithmetic on CPUs with AVX-512: they read
SmolLM2's int4 layers at 16 GB/s where memory gives 31. Ours read them at 31. They need Linux, a
processor with AVX-512 and VNNI, and g++ (or what $CXX names); where one is missing, PyTorch's do.
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
    """The loaded kernels, where `load` has loaded them."""
    loaded = load()
    assert not isinstance(loaded, str), loaded
    return loaded


@functools.cache
def load() -> ctypes.CDLL | str:
    """The kernels, compiled where that was not done before; or the reason why they cannot run."""
    if sys.platform != "linux":
        return "they need Linux"
    has = torch.cpu.get_capabilities()
    if missing := [one for one in _NEEDED if not has.get(one)]:
        return f"the processor has no {', '.join(missing)}"
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        return "there is no C++ compiler: neither g++ nor $CXX"
    flags = (*_FLAGS, "-mavx512bf16") if has.get("avx512_bf16") else _FLAGS
    sources = [path.read_text() for path in sorted(_SOURCES.iterdir())]
    key = (*sources, torch.__version__, compiler, *flags)
    path = cache_folder() / f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so"
    with contextlib.suppress(OSError):
        return _open(path)  # raises OSError where the file is missing or damaged
    try:
        _compile([*shlex.split(compiler), *flags], path)
        return _open(path)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return f"{compiler} fails: {said or error}"
    except OSError as error:
        return str(error)


def _compile(compiler: list[str], path: Path) -> None:
    if sys.stderr and sys.stderr.isatty():
        print("gptk: compiling its kernels for this machine, once…", file=sys.stderr)
    libraries = Path(torch.__file__).parent / "lib"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as pool:

        def run(*words: str) -> None:
            subprocess.run([*compiler, *words], check=True, capture_output=True)

        parts = {str(one): f"{folder}/{one.stem}.o" for one in _SOURCES.glob("*.cpp")}
        list(pool.map(lambda part: run("-c", part[0], "-o", part[1]), parts.items()))
        made = Path(folder) / path.name
        run(*parts.values(), f"-L{libraries}", "-ltorch_cpu", "-o", str(made))
        made.replace(path)


def _open(path: Path) -> ctypes.CDLL:
    # Global, so that a program by AOTInductor finds them.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    flag, real, to, size = ctypes.c_int, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64
    takes: dict[str, list[Any]] = {
        "gptk_linear": [flag, flag, to, to, to, to, size, size, size],
        "gptk_dense": [flag, to, to, to, to, size, size, size],
        "gptk_pack": [flag, to, to, to, to, size, size],
        "gptk_dequantize": [flag, to, to, to, to, size],
        "gptk_expand": [flag, flag, to, to, size, size],
        "gptk_product": [
            to,
            size,
            flag,
            flag,
            to,
            size,
            flag,
            flag,
            to,
            size,
            to,
            flag,
            *[size] * 3,
        ],
        "gptk_column_sums": [flag, to, to, size, size],
        "gptk_cross_entropy": [flag, to, to, to, real, size, size, size],
        "gptk_rms_norm": [flag, to, to, real, to, size, size],
        "gptk_swiglu": [flag, to, to, size, size],
        "gptk_gelu": [flag, to, to, to, size],
        "gptk_rotate": [flag, to, to, to, to, size, size, size],
        "gptk_exponential": [to, size, to, to, size],
        "gptk_sums": [to, to, to, to, size, size],
        "gptk_last_key": [to, to, ctypes.c_double, to, size, size],
        "gptk_keep_from": [to, to, to, to, size, size],
        "gptk_top": [to, to, to, to, size, size, size],
        "gptk_draw": [to, to, to, to, size, size],
        "gptk_permutation": [size, size, size, to],
        "gptk_attend_causally": [flag, *[to] * 5, real, *[size] * 9],
        "gptk_attend_causally_backward": [*[to] * 9, real, *[size] * 9],
        "gptk_attend": [flag, to, to, to, to, to, real, *[size] * 10],
    }
    for name, types in takes.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
