"""Kernels of any instruction set, in another process: see cpp/served.cpp.

A program is compiled for each instruction set, and run by qemu if it is for another processor.
"""

import contextlib
import ctypes
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gptk.kernels import build, compiler
from gptk.kernels.door import Door
from gptk.kernels.instructions import INSTRUCTION_SETS
from gptk.kernels.signatures import KERNELS
from gptk.system import processor

PROGRAM = Path(__file__).with_name("cpp") / "served.cpp"
NAMES = [instructions.name for instructions in INSTRUCTION_SETS]


def compile_program(name: str, folder: Path) -> list[str]:
    """The command that runs the kernels of an instruction set. Skips the test if there is none."""
    (instructions,) = (found for found in INSTRUCTION_SETS if found.name == name)
    machine = instructions.machine or processor.machine()
    prefix, emulator = "", []
    if machine != processor.machine():
        prefix, emulator = f"{machine}-linux-gnu-", [f"qemu-{machine}"]
    elif not instructions.runs_on(machine, processor.features()):
        pytest.skip(f"this processor does not run {instructions.words}")
    for program in (f"{prefix}g++", *emulator):
        if platform.system() != "Linux" or shutil.which(program) is None:
            pytest.skip(f"{program} for Linux is not installed")
    path = folder / name
    flags = [flag for flag in compiler.flags(instructions.flags) if flag != "-fopenmp"]
    flags += ["-O1", "-static", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [f"{prefix}g++", *flags, f"-I{compiler.SOURCES}", str(PROGRAM), "-o", str(path)]
    subprocess.run(command, check=True)
    return [*emulator, str(path)]


class Served:
    """Kernels whose functions are called in a process.

    Tensors are known by their addresses, which `in_use` gathers.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._bytes_at: dict[int, int] = {}
        self._of_this_call: set[int] = set()
        """Addresses that were asked for since the last call."""

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def function(self, name: str, types: list[type]) -> Callable[..., int]:
        """An exported function, which takes what the library's does."""
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
        self._of_this_call.clear()
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
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in sizes)
            count = (last + 1) * tensor.element_size() if tensor.numel() else 0
            if address in self._of_this_call:  # two tensors begin there
                count = max(count, self._bytes_at[address])
            self._of_this_call.add(address)
            self._bytes_at[address] = count
            return address

        door = Door(KERNELS, lambda kernel: self.function(f"gptk_{kernel.name}", kernel.ctypes))

        def opened() -> Door:
            # Also here: a kernel that has nothing to do is not called, and next at an address may
            # be another tensor, a smaller one.
            self._of_this_call.clear()
            return door

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "data_ptr", remember)
            for module, loaded in list(sys.modules.items()):
                is_caller = module.startswith("gptk.kernels.") and loaded is not build
                if is_caller and getattr(loaded, "library", None) is build.library:
                    patch.setattr(loaded, "library", opened)
            yield
