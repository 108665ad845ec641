"""gptk's own kernels, the C++ code in the folder cpp: choosing and loading the library.

There is a library for each instruction set. An installed wheel has them compiled; elsewhere the one
that this machine runs is compiled at the first use, and kept in the cache folder. Where neither is
possible, PyTorch's operations are used.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from gptk.errors import DeviceError
from gptk.kernels import compiler
from gptk.kernels.door import Door
from gptk.kernels.instructions import INSTRUCTION_SETS, InstructionSet
from gptk.kernels.signatures import KERNELS
from gptk.system import processor
from gptk.system.compiled_code import Code, load_or_make
from gptk.system.threads import share_openmp, use_threads_that_start

_log = logging.getLogger(__name__)

_INSTALLED = Path(__file__).with_name("compiled")
"""The libraries that a wheel has, each with the name of its instruction set."""


@dataclass(frozen=True)
class Kernels:
    """A loaded library."""

    library: ctypes.CDLL
    instructions: InstructionSet
    installed: bool
    """Whether it was installed with gptk; else it was compiled on this machine."""

    @functools.cached_property
    def door(self) -> Door:
        """What calls its functions."""
        return Door(KERNELS, lambda kernel: getattr(self.library, f"gptk_{kernel.name}"))


_loaded: Kernels | str | None = None
"""See `load`."""
_lock = threading.Lock()


def library() -> Door:
    """The kernels. They must be available: see `load`."""
    loaded = _loaded if _loaded is not None else load()
    if isinstance(loaded, str):
        raise RuntimeError(f"gptk's kernels do not run here: {loaded}")
    return loaded.door


def load() -> Kernels | str:
    """The kernels, compiled if this machine has not done so yet; or why they cannot run.

    The first call decides. Threads that call at the same time wait for it. Raises DeviceError if
    $GPTK_KERNELS names no instruction set, or one that this processor does not have.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> Kernels | str:
    allowed = _allowed(os.environ.get("GPTK_KERNELS", ""))
    if isinstance(allowed, str):
        return allowed
    try:
        share_openmp()
        use_threads_that_start()
        installed = (_load_installed(instructions) for instructions in allowed)
        best = next((found for found in installed if found), None)
        return best or Kernels(_compiled(allowed[0]), allowed[0], installed=False)
    except PermissionError as error:
        return f"{error}; name a folder of your own in $GPTK_CACHE"
    except (compiler.UnusableCompilerError, OSError, AttributeError) as error:
        return _printable(str(error))


def _allowed(name: str) -> list[InstructionSet] | str:
    """The instruction set of that name, or if it is empty those of this processor, the best first.

    Returns why there is none, and raises DeviceError as `load` does.
    """
    if name == "none":
        return "they are switched off by GPTK_KERNELS=none"
    if sys.platform not in ("linux", "darwin"):
        return "they need Linux or macOS"
    usable = runnable()
    if not name:
        automatic = [found for found in usable if found.automatic]
        return automatic or _why_none(processor.machine())
    if named := [found for found in usable if found.name == name]:
        return named
    allowed = ", ".join([found.name for found in usable] + ["none"])
    known = any(found.name == name for found in INSTRUCTION_SETS)
    problem = "which this processor does not run" if known else "which is no instruction set"
    raise DeviceError(f"GPTK_KERNELS is {name!r}, {problem}; here it may be {allowed}")


def runnable() -> list[InstructionSet]:
    """The instruction sets that this processor has, the best first."""
    machine, features = processor.machine(), processor.features()
    return [found for found in INSTRUCTION_SETS if found.runs_on(machine, features)]


def _why_none(machine: str) -> str:
    needed = [found.words for found in INSTRUCTION_SETS if found.machine == machine]
    if not needed:
        return f"there are none for {machine} processors"
    return f"this processor lacks {needed[-1]}"


def _load_installed(instructions: InstructionSet) -> Kernels | None:
    """The library that was installed with gptk, if there is one and it can be loaded."""
    path = _INSTALLED / f"{instructions.name}.so"
    if not path.exists():
        return None
    try:
        return Kernels(_open(path), instructions, installed=True)
    except (OSError, AttributeError) as error:
        _log.warning("%s cannot be loaded, and the kernels are compiled here: %s", path, error)
        return None


def _compiled(instructions: InstructionSet) -> ctypes.CDLL:
    """The library that is compiled on this machine, now or before."""
    command = compiler.find_compiler()
    sources = [path.read_bytes() for path in sorted(compiler.SOURCES.iterdir())]
    origin = {
        "sources": hashlib.sha256(b"\0".join(sources)).hexdigest(),
        "compiler": f"{shlex.join(command)}, {_identity(command[0])}",
        "flags": shlex.join(compiler.flags(instructions.flags)),
        "libraries": _c_library(),
    }

    def make(path: Path) -> None:
        level = logging.INFO
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            if sys.stderr and sys.stderr.isatty():
                level = logging.WARNING  # somebody waits
        _log.log(level, "compiling gptk's kernels for this machine, once: some ten seconds")
        compiler.compile_library(command, instructions.flags, path)

    return load_or_make(Code("kernels", origin, make), _open)


def _c_library() -> str:
    """The C library and its version, where the system tells."""
    with contextlib.suppress(ValueError, OSError):
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    return ""


def _identity(program: str) -> str:
    """A text that changes when a program is replaced by another version."""
    path = Path(program).resolve()
    status = path.stat()
    return f"{path}, {status.st_size} bytes of {status.st_mtime_ns}"


def _printable(text: str) -> str:
    """A line of a compiler's, fit to be shown."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300]


def _open(path: Path) -> ctypes.CDLL:
    """Load the shared library and declare what its functions take. They return a Status.

    Raises OSError if it is none, and AttributeError if it lacks one of them.
    """
    library = ctypes.CDLL(str(path))
    for kernel in KERNELS:
        function = getattr(library, f"gptk_{kernel.name}")
        function.argtypes, function.restype = kernel.ctypes, ctypes.c_int32
    return library
