"""Which matrices of a model are kept quantized in memory: building a model and `gptk info` ask."""

import torch

from gptk import kernels
from gptk.model.levels import GROUP, Precision
from gptk.model.quantization import Quantize, keeps_levels

_PRECISIONS: dict[int, Precision] = {8: "int8", 4: "int4"}


def matrix_kind(
    inputs: int, bits: int | None, quantize: Quantize, device: torch.device, dtype: torch.dtype
) -> Precision | None:
    """The precision of a linear layer's matrix in memory; None if it is dense.

    bits: of each weight, if the checkpoint has the matrix as Levels.
    """
    if quantize == "auto":
        return _PRECISIONS[bits] if bits and keeps_levels(device, dtype) else None
    if quantize == "none" or device.type not in ("cpu", "cuda") or inputs % GROUP:
        return None
    return quantize


def embedding_kind(
    inputs: int, bits: int | None, quantize: Quantize, device: torch.device, dtype: torch.dtype
) -> Precision | None:
    """The same for the embedding: only gptk's kernels look up quantized rows."""
    if quantize != "auto" or not kernels.available():
        return None
    return matrix_kind(inputs, bits, quantize, device, dtype)
