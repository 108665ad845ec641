"""Which matrices of a model are kept quantized in memory: building a model and `gptk info` ask."""

import torch

from gptk import kernels
from gptk.model.levels import GROUP
from gptk.model.quantization import Quantize, keeps_levels
from gptk.model.segments import Segments


def matrix_kind(
    inputs: int,
    stored: Segments | None,
    quantize: Quantize,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """The precision of a linear layer's matrix in memory; None if it is dense.

    stored: how the checkpoint has the matrix, if as Levels.
    """
    if quantize == "auto":
        return stored.kind if stored and keeps_levels(stored, device, dtype) else None
    if quantize == "none" or device.type not in ("cpu", "cuda") or inputs % GROUP:
        return None
    return quantize


def embedding_kind(
    inputs: int,
    stored: Segments | None,
    quantize: Quantize,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """The same for the embedding: only gptk's kernels look up quantized rows."""
    if quantize != "auto" or not kernels.available():
        return None
    return matrix_kind(inputs, stored, quantize, device, dtype)
