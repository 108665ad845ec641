"""Whether Triton's kernels can run on a GPU, and how they divide their work. Imports no Triton."""

import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch

from gptk.system.once import computed_once


@dataclass(frozen=True)
class Tiling:
    """How attention is divided between programs on a GPU, see gptk.kernels.triton_attention."""

    queries: int
    """Queries of a tile: tokens times the heads that share keys, rounded up to a power of two."""
    parts: int
    """Between how many programs the keys of a tile are divided."""

    def tokens(self, group: int) -> int:
        """The most tokens of a tile. group: query heads that share keys."""
        return max(1, self.queries // power_of_two(group))


def tiling(dtype: torch.dtype, *, few: bool) -> Tiling:
    """For passes of few tokens, most of them the only one of their row; or for prompts.

    In float32 there are no tensor cores, and large tiles would not fit into registers.
    """
    return Tiling(16, 8) if few else Tiling(16 if dtype == torch.float32 else 64, 1)


def can_attend(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether Triton's attention can run. group: query heads that share keys."""
    return (
        device.type == "cuda"
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and head_dim * dtype.itemsize <= _MOST_BYTES_OF_HEAD
        and group <= _MOST_GROUP
        and why_not_triton() is None
    )


@computed_once
def why_not_triton() -> str | None:
    """Why Triton cannot compile kernels here, and what to do about it; None if it can.

    A clause for a message, as of `gptk.kernels.why_not`.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install the package triton"
    # Triton compiles with it, once, what launches its kernels.
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return "there is no C compiler, which Triton needs; install gcc"
    return None


def power_of_two(number: int) -> int:
    """The lowest that is not below the number."""
    return 1 << (number - 1).bit_length()


_MOST_BYTES_OF_HEAD = 512
"""With more, a block of keys does not fit into the shared memory of every GPU."""
_MOST_GROUP = 64
