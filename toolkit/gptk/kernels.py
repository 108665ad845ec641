"""gptk's own kernels, in kernels.cpp: compiled once by the machine's compiler, and kept.

PyTorch's kernels for quantized weights are bound by arithmetic on CPUs with AVX-512: they read
SmolLM2's int4 layers at 16 GB/s where memory gives 31. Ours read them at 31. They need Linux, a
processor with AVX-512 and VNNI, and g++ (or what $CXX names); where one is missing, PyTorch's do.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptk.data import cache_folder

_SOURCE = Path(__file__).with_name("kernels.cpp")
_NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni", "f16c", "fma3")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
)


def available() -> bool:
    """Whether this machine can run them; the first call compiles them, in a second or two."""
    return _library() is not None


def linear(x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int) -> Tensor:
    """x (rows, inputs) times weights in groups of 32, plus the bias: (rows, outputs), as x is.

    x: bfloat16 or float32. weights: uint8, as gptk.quantization.Groups packs them; bits: 4 or 8.
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.gptk.few_rows_linear(x, weights, bits, outputs)
        return y if bias is None else y + bias
    return _linear(x, weights, bias, bits, outputs)


def _linear(x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int) -> Tensor:
    library = _library()
    assert library is not None
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    rows, inputs = x.shape
    y = torch.empty(rows, outputs, dtype=x.dtype)
    library.gptk_linear(
        bits,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        weights.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows,
        inputs,
        outputs,
    )
    return y


def shims() -> dict[Any, list[str]]:
    """For AOTInductor: how its programs call them without PyTorch's dispatcher between."""
    if not available():
        return {}
    function = (
        "AOTITorchError aoti_torch_cpu_few_rows_linear(AtenTensorHandle x, "
        "AtenTensorHandle weights, int64_t bits, int64_t outputs, AtenTensorHandle* y)"
    )
    return {torch.ops.gptk.few_rows_linear.default: [function]}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, loaded; None where they cannot be."""
    has = torch.cpu.get_capabilities()
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if sys.platform != "linux" or not all(has.get(one) for one in _NEEDED) or not compiler:
        return None
    key = (_SOURCE.read_text(), torch.__version__, compiler, *_FLAGS)
    path = cache_folder() / f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so"
    with contextlib.suppress(OSError):
        return _load(path)  # raises OSError where the file is missing or damaged
    try:
        _compile(compiler, path)
        return _load(path)
    except (OSError, subprocess.CalledProcessError):
        return None


def _compile(compiler: str, path: Path) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), f"-L{libraries}", "-ltorch_cpu"]
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
        made.replace(path)


def _load(path: Path) -> ctypes.CDLL:
    # Global, so that a program by AOTInductor finds them.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.gptk_linear.argtypes = [ctypes.c_int] * 2 + [pointer] * 4 + [number] * 3
    library.gptk_linear.restype = None
    _define()
    return library


def _define() -> None:
    """Tell PyTorch's compilers of them."""
    schema = "few_rows_linear(Tensor x, Tensor weights, int bits, int outputs) -> Tensor"
    ops: Any = torch.library.Library("gptk", "DEF")  # type: ignore[no-untyped-call]
    ops.define(schema)
    ops.impl("few_rows_linear", lambda x, *rest: _linear(x, rest[0], None, *rest[1:]), "CPU")
    torch.library.register_fake(
        "gptk::few_rows_linear",
        lambda x, weights, bits, outputs: x.new_empty(x.shape[0], outputs),
        lib=ops,
    )
    _defined.append(ops)


_defined: list[object] = []
"""Kept, as an operator goes with its library."""
