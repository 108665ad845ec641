"""Kernels of any instruction set, in another process: see cpp/served.cpp.

A program is compiled for each instruction set, and run by qemu if it is for another processor.
"""

import contextlib
import ctypes
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import gptk
from gptk.kernels import build

CPP = Path(gptk.__file__).parent / "kernels" / "cpp"
PROGRAM = Path(__file__).with_name("cpp") / "served.cpp"


@dataclass(frozen=True)
class InstructionSet:
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Of the processor, as in /proc/cpuinfo."""
    compiler: str = "g++"
    emulator: str | None = None


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")


def _x86(macro: str, *needs: str) -> InstructionSet:
    flags = [f"-m{name.replace('_', '')}" for name in needs]
    return InstructionSet((f"-DGPTK_{macro}", *flags), needs)


def _neon(extensions: str) -> InstructionSet:
    flags = ("-DGPTK_NEON", f"-march=armv8.2-a+{extensions}")
    return InstructionSet(flags, (), "aarch64-linux-gnu-g++", "qemu-aarch64")


INSTRUCTION_SETS = {
    "plain": InstructionSet(("-DGPTK_PLAIN",)),
    "avx2": _x86("AVX2", *_AVX2),
    "avx2-vnni": _x86("AVX2", *_AVX2, "avx_vnni"),
    "avx512": _x86("AVX512", *_AVX512),
    "avx512-bf16": _x86("AVX512", *_AVX512, "avx512_bf16"),
    "neon": _neon("dotprod"),
    "neon-i8mm": _neon("dotprod+i8mm"),
}


def compile_program(name: str, folder: Path) -> list[str]:
    """The command that runs the kernels of an instruction set. Skips the test if there is none."""
    instructions = INSTRUCTION_SETS[name]
    if instructions.needs and set(instructions.needs) - _features():
        pytest.skip(f"this processor has not all of {', '.join(instructions.needs)}")
    for program in (instructions.compiler, instructions.emulator):
        if program and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    path = folder / name
    command = [instructions.compiler, "-O1", "-std=c++17", "-ffp-contract=off", "-static"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *instructions.flags]
    command += [f"-DGPTK_MAX_QUERIES={gptk.kernels.FEW_QUERIES}", f"-I{CPP}"]
    subprocess.run([*command, str(PROGRAM), "-o", str(path)], check=True)
    return [*([instructions.emulator] if instructions.emulator else []), str(path)]


def _features() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":")[1].split())
    return set()


class Served:
    """Stands for a library of kernels: calls its functions in a process.

    Tensors are known by their addresses, which `addresses_of` gathers.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._bytes_at: dict[int, int] = {}

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        types = getattr(build.library(), name).argtypes
        return lambda *arguments: self._call(name, types, arguments)

    def _call(self, name: str, types: list[type], arguments: tuple[object, ...]) -> int:
        request = [f"{name}\n".encode()]
        for kind, value in zip(types, arguments, strict=True):
            if kind is not ctypes.c_void_p:
                request.append(bytes(kind(value)))
            elif not value:
                request.append(struct.pack("q", -1))
            else:
                count = self._bytes_at[value]
                request += [struct.pack("q", count), ctypes.string_at(value, count)]
        self._process.stdin.write(b"".join(request))
        self._process.stdin.flush()
        (status,) = struct.unpack("i", self._read(4))
        while (index := struct.unpack("q", self._read(8))[0]) >= 0:
            count = self._bytes_at[arguments[index]]
            ctypes.memmove(arguments[index], self._read(count), count)
        return status

    def _read(self, count: int) -> bytes:
        read = self._process.stdout.read(count)
        if len(read) < count:  # exit codes are those of cpp/served.cpp
            raise RuntimeError(f"the process of the kernels ended with {self._process.wait()}")
        return read

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let gptk.kernels call these kernels."""
        data_ptr = torch.Tensor.data_ptr

        def remember(tensor: torch.Tensor) -> int:
            address = data_ptr(tensor)
            start = tensor.storage_offset() * tensor.element_size()
            self._bytes_at[address] = tensor.untyped_storage().nbytes() - start
            return address

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "data_ptr", remember)
            for module, loaded in list(sys.modules.items()):
                is_caller = module.startswith("gptk.kernels.") and loaded is not build
                if is_caller and getattr(loaded, "library", None) is build.library:
                    patch.setattr(loaded, "library", lambda: self)
            yield
