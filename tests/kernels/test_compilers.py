"""The kernels' C++ compiles without a warning, for each instruction set and with each compiler."""

import shutil
import sys

import pytest

from gptk.kernels import compiler
from gptk.kernels.instructions import INSTRUCTION_SETS

COMPILERS = {
    "g++": "x86_64",
    "clang++": "x86_64",
    "aarch64-linux-gnu-g++": "aarch64",
}
CASES = [
    (name, instructions)
    for name, machine in COMPILERS.items()
    for instructions in INSTRUCTION_SETS
    if instructions.machine in (None, machine)
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the names of compilers are Linux's")
@pytest.mark.parametrize(
    ("name", "instructions"), CASES, ids=[f"{name}-{found.name}" for name, found in CASES]
)
def test_there_are_no_warnings(name, instructions, tmp_path, monkeypatch):
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    monkeypatch.setenv("CXX", f"{name} -O0")  # the compiler warns before it optimizes
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [*compiler.find_compiler(), *warnings]
    compiler.compile_library(command, instructions.flags, tmp_path / "k.so", portable=True)
