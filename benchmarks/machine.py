"""What this machine can do at best, measured once a session: the limits that results are held to.

A step of decoding reads every weight once, so memory bounds it; a prompt or a training step is
arithmetic. `Work.limit` takes whichever of the two lasts longer (the roofline, Williams et al.
2009).
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import gptk

THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
"""For gptk and for every peer."""
_BYTES = 512 * 2**20  # beyond any cache
_SIDE = 2048


@dataclass(frozen=True)
class Limits:
    """The best of several runs, for a device."""

    bandwidth: float
    """Bytes read from memory a second."""
    float32: float
    """Floating-point operations a second of a 2048³ matrix product."""
    bfloat16: float

    def __str__(self) -> str:
        return (
            f"memory {self.bandwidth / 1e9:.1f} GB/s, arithmetic {self.float32 / 1e9:.0f} GFLOP/s "
            f"in float32, {self.bfloat16 / 1e9:.0f} in bfloat16"
        )


@dataclass(frozen=True)
class Work:
    """The least that a piece of work takes."""

    tokens: float = 0
    """That it makes or reads."""
    bytes: float = 0
    """To be read from memory once."""
    operations: float = 0
    dtype: str = "bfloat16"
    """That the operations are in."""

    def limit(self, limits: Limits) -> tuple[float, str]:
        """The seconds that the machine would take at its best, and what bounds it."""
        memory = self.bytes / limits.bandwidth
        arithmetic = self.operations / getattr(limits, self.dtype)
        return max((memory, "memory"), (arithmetic, "arithmetic"))


@functools.cache
def limits(device: str = "cpu") -> Limits:
    """Measure a device; takes a second or two."""
    block = torch.ones(_BYTES // 4, device=device)

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
        return 2 * _SIDE**3 / _best(lambda: a @ b, device)

    return Limits(
        bandwidth=block.nbytes / _best(block.sum, device),
        float32=product(torch.float32),
        bfloat16=product(torch.bfloat16),
    )


def describe() -> str:
    """The machine and the versions, in a line."""
    name = "an unknown processor"
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {THREADS} threads, torch {torch.__version__}, gptk {gptk.__version__}"


def synchronized(function: Callable[[], object], device: str) -> Callable[[], object]:
    """The function, until all that it asked of a GPU is done."""
    if not device.startswith("cuda"):
        return function

    def run() -> object:
        result = function()
        torch.cuda.synchronize(device)
        return result

    return run


def _best(function: Callable[[], object], device: str, runs: int = 7) -> float:
    """Seconds of the fastest run."""
    run = synchronized(function, device)
    run()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
