"""The limits of this machine, measured once per session: memory bandwidth and arithmetic.

A decoding step reads every weight once, so memory bounds it; arithmetic bounds prefill and training
steps. `Work.limit` is the longer of the two times (the roofline, Williams et al. 2009).
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import gptk

DEVICE = "cpu"
"""The device of all benchmarks without `-m peers`: the option --device."""
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
"""The number of threads of gptk and of every peer."""
_BYTES, _BYTES_ON_GPU = 2**29, 2**31  # larger than any cache
_SIDE, _SIDE_ON_GPU = 2048, 8192  # a GPU takes less time for smaller ones than to launch them


@dataclass(frozen=True)
class Limits:
    """What a device reaches in the best of several runs."""

    bandwidth: float
    """Bytes read from memory per second, on a GPU bytes read and written by a copy."""
    float32: float
    """Floating-point operations per second in a product of matrices: 2048³, on a GPU 8192³."""
    bfloat16: float

    def __str__(self) -> str:
        return (
            f"memory {self.bandwidth / 1e9:.1f} GB/s, arithmetic {self.float32 / 1e9:.0f} GFLOP/s "
            f"in float32, {self.bfloat16 / 1e9:.0f} in bfloat16"
        )


@dataclass(frozen=True)
class Work:
    """The least work that an operation needs."""

    tokens: float = 0
    """The tokens that it generates or reads."""
    bytes: float = 0
    """The bytes that it must read from memory."""
    operations: float = 0
    dtype: str = "bfloat16"
    """The dtype of the operations."""

    def limit(self, limits: Limits) -> tuple[float, str]:
        """The least time in seconds, and what bounds it: memory or arithmetic."""
        memory = self.bytes / limits.bandwidth
        arithmetic = self.operations / getattr(limits, self.dtype)
        return max((memory, "memory"), (arithmetic, "arithmetic"))


@functools.cache
def limits(device: str = "cpu") -> Limits:
    """Measure a device; takes a second or two."""
    on_gpu = device.startswith("cuda")
    side = _SIDE_ON_GPU if on_gpu else _SIDE
    block = torch.ones((_BYTES_ON_GPU if on_gpu else _BYTES) // 4, device=device)

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return 2 * side**3 / _best(lambda: a @ b, device)

    if on_gpu:
        copy = torch.empty_like(block)
        bandwidth = 2 * block.nbytes / _best(lambda: copy.copy_(block), device)
    else:
        bandwidth = block.nbytes / _best(block.sum, device)
    return Limits(bandwidth, product(torch.float32), product(torch.bfloat16))


def describe() -> str:
    """The machine and the versions, in one line."""
    name = "an unknown processor"
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {THREADS} threads, torch {torch.__version__}, gptk {gptk.__version__}"


def synchronized(function: Callable[[], object], device: str) -> Callable[[], object]:
    """The function, followed by a wait for the GPU."""
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
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
