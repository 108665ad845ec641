"""A kernel for programs that AOTInductor compiles, which call C functions in place of operators."""

import ctypes
import hashlib
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from gptk.errors import DeviceError
from gptk.kernels import compiler
from gptk.kernels.build import identity
from gptk.kernels.checks import available
from gptk.system.compiled_code import Code, load_or_make

_SOURCE = compiler.SOURCES / "aoti" / "quantized_linear.cpp"


def aoti_shims() -> dict[Any, list[str]]:
    """For AOTInductor's option `custom_ops_to_c_shims`: C functions that its programs call in place
    of operators, without PyTorch's dispatcher."""
    if not available():
        return {}
    function = (
        "AOTITorchError aoti_torch_cpu_quantized_linear(AtenTensorHandle x, "
        "AtenTensorHandle weights, int64_t bits, int64_t outputs, AtenTensorHandle* y)"
    )
    return {torch.ops.gptk.quantized_linear.default: [function]}


def load_aoti_shims() -> None:
    """Make these functions ready for programs. They are compiled at the first use on a machine.

    Raises DeviceError if they cannot be.
    """
    if not available():
        return
    try:
        command = compiler.find_compiler()
        flags = ["-O2", "-std=c++17", "-fPIC", "-shared"]
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        origin = {
            "source": hashlib.sha256(_SOURCE.read_bytes()).hexdigest(),
            "compiler": f"{shlex.join(command)}, {identity(command[0])}",
            "flags": shlex.join([*flags, *libraries]),
            "torch": torch.__version__,
        }

        def make(path: Path) -> None:
            call = [*command, *flags, str(_SOURCE), *libraries, "-o", str(path)]
            compiler.run([call], path.parent, time.monotonic() + 60)

        load_or_make(Code("shims", ".so", origin, make), _open)
    except (compiler.UnusableCompilerError, OSError) as error:
        raise DeviceError(f"the step cannot be compiled here: {error}") from None


def _open(path: Path) -> ctypes.CDLL:
    # With global symbols, so that programs find them.
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
