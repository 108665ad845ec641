"""The kernels' C++ compiles without a warning, for each instruction set and with each compiler; and
what clang makes of it runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="on macOS all tests run with clang")
def test_kernels_of_clang_pass_their_tests(tmp_path):
    """With two threads: clang's OpenMP is that of cpp/clang_openmp.cpp."""
    if shutil.which("clang++") is None:
        pytest.skip("needs clang++")
    chosen = {"CXX": "clang++", "GPTK_CACHE": str(tmp_path), "OMP_NUM_THREADS": "2"}
    environment = {**os.environ, **chosen}
    here = Path(__file__).parent
    files = [here / "test_kernels.py", here.parent / "model/test_walk.py"]
    for command in (
        ["-c", "import sys; from gptk import kernels; sys.exit(kernels.why_not())"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
    ):
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
