"""Random blocks of quantized weights, as GGUF files have them."""

import numpy as np
import torch

from gptk import kernels

FORMATS = [name for name, format in kernels.FORMATS.items() if format.stored]
HALVES = {
    **dict.fromkeys(FORMATS, (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}
"""Where the float16 numbers of a block are."""


def random_blocks(format: str, outputs: int, count: int, seed: int) -> torch.Tensor:
    """Blocks with any codes and any scales, of which float16 numbers are below 2.

    So all weights are finite in float32.
    """
    numbers = np.random.default_rng(seed)
    size = kernels.FORMATS[format].stored
    blocks = numbers.integers(0, 256, (outputs, count, size), dtype=np.uint8)
    for at in HALVES[format]:
        halves = numbers.integers(0, 2**16, (outputs, count, 1), dtype=np.uint16)
        blocks[:, :, at : at + 2] = (halves & np.uint16(0xBFFF)).view(np.uint8)
    if format == "MXFP4":
        blocks[:, :, 0] %= 150
    return torch.from_numpy(blocks)


def small_rows(format: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Rows of blocks, (outputs, bytes), with any codes; the weights are about as large as those of
    a model."""
    outputs, inputs = shape
    blocks = random_blocks(format, outputs, inputs // kernels.FORMATS[format].unit, seed).numpy()
    for at in HALVES[format]:
        # Scales have 4, 6 or 8 bits, with or without a sign.
        size = {"Q2_K": 2e-3, "Q3_K": 5e-4, "Q6_K": 3e-5}.get(format, 1e-4)
        blocks[:, :, at : at + 2] = np.array([size], dtype=np.float16).view(np.uint8)
    return blocks.reshape(outputs, -1)
