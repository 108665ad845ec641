"""The instruction sets that the kernels are compiled for, each into a library of its own.

This module imports only Python's library, as it is also run to build wheels.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class InstructionSet:
    """What a library of the kernels is compiled with, and what it needs to run."""

    name: str
    """As $GPTK_KERNELS has it."""
    words: str
    """The name that people know it by."""
    machine: str | None
    """The kind of processor, see `gptk.system.processor.machine`; None: any."""
    flags: tuple[str, ...]
    """The compiler's options."""
    needs: tuple[str, ...] = ()
    """See `gptk.system.processor.features`."""
    automatic: bool = True
    """Whether it is chosen without $GPTK_KERNELS."""

    def runs_on(self, machine: str, features: Collection[str]) -> bool:
        """Whether a processor of this kind and with these features has the instructions."""
        return self.machine in (None, machine) and all(name in features for name in self.needs)


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
_AVX512_FLAGS = tuple(f"-m{name.replace('_', '')}" for name in _AVX512)
_NEON = ("asimddp",)

INSTRUCTION_SETS = (
    InstructionSet(
        name="avx512-bf16",
        words="AVX-512 with VNNI and BF16",
        machine="x86_64",
        flags=("-DGPTK_AVX512", *_AVX512_FLAGS, "-mavx512bf16"),
        needs=(*_AVX512, "avx512_bf16"),
    ),
    InstructionSet(
        name="avx512",
        words="AVX-512 with VNNI",
        machine="x86_64",
        flags=("-DGPTK_AVX512", *_AVX512_FLAGS),
        needs=_AVX512,
    ),
    InstructionSet(
        name="avx2-vnni",
        words="AVX2 with AVX-VNNI",
        machine="x86_64",
        flags=("-DGPTK_AVX2", "-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
        needs=(*_AVX2, "avx_vnni"),
    ),
    InstructionSet(
        name="avx2",
        words="AVX2 with FMA and F16C",
        machine="x86_64",
        flags=("-DGPTK_AVX2", "-mavx2", "-mfma", "-mf16c"),
        needs=_AVX2,
    ),
    InstructionSet(
        name="neon-i8mm",
        words="NEON with dot products and I8MM",
        machine="aarch64",
        flags=("-DGPTK_NEON", "-march=armv8.2-a+dotprod+i8mm"),
        needs=(*_NEON, "i8mm"),
    ),
    InstructionSet(
        name="neon",
        words="NEON with dot products",
        machine="aarch64",
        flags=("-DGPTK_NEON", "-march=armv8.2-a+dotprod"),
        needs=_NEON,
    ),
    InstructionSet(
        name="plain",
        words="plain C++",
        machine=None,
        flags=("-DGPTK_PLAIN",),
        automatic=False,  # a reference for the others; PyTorch's own kernels are faster
    ),
)
"""All there are, the fastest of a machine first."""
