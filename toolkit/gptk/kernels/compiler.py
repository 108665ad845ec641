"""Compiling the kernels, the C++ code in the folder cpp, into a shared library.

The library links neither PyTorch nor an OpenMP library: it finds OpenMP's functions in the process
that loads it. So it shares PyTorch's threads, and one library goes with every version of PyTorch.

This module imports only Python's library, as it is also run to build wheels.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FEW_QUERIES = 16
"""The most queries of a key head over a cache that the kernel of `attend` takes. With more,
PyTorch's attention is faster."""

SOURCES = Path(__file__).with_name("cpp")

_PATIENCE = 600.0
"""Seconds that the compiler may take. It takes ten to twenty on an idle machine."""


class UnusableCompilerError(Exception):
    """Why the kernels cannot be compiled."""


def find_compiler() -> list[str]:
    """The compiler's command: that of $CXX, else g++ or clang++. Raises UnusableCompilerError."""
    named = os.environ.get("CXX", "")
    try:
        command = shlex.split(named)
    except ValueError as error:  # a quotation without an end
        message = f"$CXX is {named}, which is no command: {error}"
        raise UnusableCompilerError(message) from None
    for name in command[:1] or ["g++", "clang++"]:
        if program := shutil.which(name):
            return [program, *command[1:]]
    if named.strip():
        raise UnusableCompilerError(f"$CXX names a C++ compiler that is not there: {command[0]}")
    raise UnusableCompilerError(
        "there is no C++ compiler; install g++, or name another one in $CXX"
    )


def flags(instructions: Sequence[str]) -> list[str]:
    """The compiler's options for source files, besides -O3, which $CXX may replace.

    instructions: those of an instruction set, `InstructionSet.flags`.
    """
    # Apple's compiler knows OpenMP, but not the usual option for it.
    openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    maximum = f"-DGPTK_MAX_QUERIES={FEW_QUERIES}"
    return ["-std=c++17", "-ffp-contract=off", "-fPIC", *openmp, *instructions, maximum]


def compile_library(
    compiler: Sequence[str], instructions: Sequence[str], path: Path, *, portable: bool = False
) -> None:
    """Compile the kernels into a shared library at `path`, whose folder has room for more files.

    compiler: its command. instructions: see `flags`. portable: for other machines than this one,
    which may have older C and C++ libraries.

    Raises UnusableCompilerError if that fails, or takes more than ten minutes.
    """
    deadline = time.monotonic() + _PATIENCE
    sources = sorted(SOURCES.glob("*.cpp"))
    chosen = flags(instructions)
    if not any(word.startswith("-O") for word in compiler):
        chosen.append("-O3")
    if portable:
        chosen += ["-include", str(SOURCES / "glibc.h")]
    objects = [str(path.with_name(f"{path.stem}-{source.stem}.o")) for source in sources]
    compilations = [
        [*compiler, *chosen, "-c", str(source), "-o", compiled]
        for source, compiled in zip(sources, objects, strict=True)
    ]
    _run(compilations, path.parent, deadline)
    link = [*compiler, "-shared", *_link_flags(path.parent), *objects, "-o", str(path)]
    _run([[*link, "-s"] if portable else link], path.parent, deadline)
    if not path.is_file():
        raise UnusableCompilerError(f"{compiler[0]} writes no file")


def _link_flags(folder: Path) -> list[str]:
    """Options that export gptk's functions only, and leave those of OpenMP undefined."""
    if sys.platform == "darwin":
        return ["-Wl,-exported_symbol,_gptk_*", "-Wl,-undefined,dynamic_lookup"]
    exports = folder / "exports"
    exports.write_text("{ global: gptk_*; local: *; };\n", encoding="utf-8")
    return [f"-Wl,--version-script={exports}"]


def _run(commands: Sequence[Sequence[str]], folder: Path, deadline: float) -> None:
    """Run commands of a compiler at the same time, with their output in a folder.

    Raises UnusableCompilerError if one fails, or is not done by the deadline.
    """
    # Messages in English; temporary files where there is room for the result, too; and without the
    # libraries that were preloaded for Python, such as a sanitizer's.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder), "LD_PRELOAD": ""}
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
        raise UnusableCompilerError(f"{commands[0][0]} was not done in time") from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the programs that it has started
                process.wait()
    if any(codes):
        ended = next(code for code in codes if code)
        reason = _first_error(output) or f"it ends with {ended} and says nothing"
        raise UnusableCompilerError(f"{commands[0][0]} cannot compile them: {reason}")


def _first_error(output: Path) -> str:
    """The first line of a compiler's output that speaks of an error, else the first line."""
    with output.open(encoding="utf-8", errors="replace") as stream:
        lines = [line.strip() for line in stream.read(1 << 20).splitlines()]
    errors = [line for line in lines if "error" in line.lower()]
    return next((line for line in (*errors, *lines) if line), "")
