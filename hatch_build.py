"""Hatchling's hook for wheels: compiles the kernels for all instruction sets of a platform.

$GPTK_WHEEL names the kind of processor: x86_64, aarch64, or `none` for a wheel without compiled
kernels, which works anywhere and compiles them at the first use. For another processor than this
machine's the compiler is that of Debian's cross-compilers, aarch64-linux-gnu-g++, unless $CXX names
another one.

Without the variable it is this machine's, and what cannot be compiled is left out with a warning,
so that `pip install` of the sources works without a compiler. With it that is an error.
"""

import os
import platform
import re
import runpy
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledKernels(BuildHookInterface):
    folder: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, add the libraries to the wheel, and name the platforms that it is for."""
        asked = os.environ.get("GPTK_WHEEL", "")
        if version == "editable" or asked == "none":
            return
        here = platform.machine().lower().replace("arm64", "aarch64").replace("amd64", "x86_64")
        machine = asked or here
        kernels = Path(self.root, "toolkit", "gptk", "kernels")
        sets = runpy.run_path(str(kernels / "instructions.py"))["INSTRUCTION_SETS"]
        machines = {found.machine for found in sets if found.machine}
        if machine not in machines or sys.platform not in ("linux", "darwin"):
            if asked:
                raise ValueError(
                    f"GPTK_WHEEL is {asked!r}; it may be {', '.join(machines)} or none"
                )
            return
        if machine != here:
            os.environ.setdefault("CXX", f"{machine}-linux-gnu-g++")
        self.folder = Path(tempfile.mkdtemp())
        libraries = self._compile(
            runpy.run_path(str(kernels / "compiler.py")),
            [found for found in sets if found.machine in (None, machine)],
            strict=bool(asked),
        )
        if not libraries:
            return
        for library in libraries:
            build_data["force_include"][str(library)] = f"gptk/kernels/compiled/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(libraries, machine)}"

    def _compile(self, compiler: dict[str, Any], sets: list[Any], *, strict: bool) -> list[Path]:
        """Compile a library for each instruction set. compiler: the module of that name."""
        assert self.folder
        libraries = []
        for instructions in sets:
            library = self.folder / f"{instructions.name}.so"
            try:
                command = compiler["find_compiler"]()
                compiler["compile_library"](command, instructions.flags, library, portable=True)
            except compiler["UnusableCompilerError"] as error:
                if strict:
                    raise
                self.app.display_warning(f"no kernels for {instructions.words}: {error}")
            else:
                libraries.append(library)
        return libraries

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiler's files."""
        if self.folder:
            shutil.rmtree(self.folder)


def _platform(libraries: list[Path], machine: str) -> str:
    """The wheel's platform: on Linux by the newest version of glibc that a library needs."""
    if sys.platform == "darwin":
        return sysconfig.get_platform().replace("-", "_").replace(".", "_")
    found = [re.findall(rb"\0GLIBC_2\.(\d+)(?=[\0.])", path.read_bytes()) for path in libraries]
    versions = [int(version) for each in found for version in each]
    # With musl, for example, there are none.
    return f"manylinux_2_{max(versions)}_{machine}" if versions else f"linux_{machine}"
