"""Notices of a model that runs slower or takes more memory than it could, and why."""

import logging

import torch

from gptk import kernels
from gptk.kernels.gpu import why_not_triton
from gptk.system.devices import has_fast_products
from gptk.system.notices import tell_once

_log = logging.getLogger(__name__)


def tell_of_slow_inference(device: torch.device, dtype: torch.dtype, *, expanded: bool) -> None:
    """expanded: whether matrices that the file has quantized were dequantized."""
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        if expanded:
            small = "; --quantize int4 takes less memory" if device.type == "cuda" else ""
            tell_once(
                _log,
                f"the matrices that the file has quantized are expanded to {name}, since gptk's "
                f"kernels for them do not run on {device.type}{small}",
            )
        if device.type == "cuda" and (reason := why_not_triton()) is not None:
            tell_once(
                _log,
                f"decoding on {device.type} is many times slower than it could be: {reason}. "
                "PyTorch's operations attend row by row, and no CUDA graphs are made",
            )
        return
    if not has_fast_products(dtype) and not (dtype == torch.bfloat16 and kernels.available()):
        tell_once(
            _log,
            f"this processor has no instructions for {name}, which is converted to float32 for "
            "each product; --dtype float32 is faster, and takes more memory",
        )
    if reason := kernels.why_not():
        more = ""
        if expanded:
            more = (
                f", with the matrices that the file has quantized expanded to {name} "
                "(--dtype bfloat16 keeps them quantized)"
            )
        tell_once(
            _log,
            f"gptk's kernels do not run here: {reason}. PyTorch's run instead, at half the speed "
            f"or less{more}",
        )


def tell_of_slow_training(device: torch.device, dtype: torch.dtype) -> None:
    """dtype: that of matrix products, by autocast."""
    if device.type != "cpu" or dtype == torch.float32:
        return  # float32 training is computed by PyTorch everywhere
    if not has_fast_products(dtype):
        tell_once(
            _log,
            f"this processor has no instructions for {str(dtype).removeprefix('torch.')}; training "
            "in float32 is faster (dtype=float32)",
        )
    elif reason := kernels.why_not():
        tell_once(
            _log,
            f"gptk's kernels do not run here: {reason}. Training takes PyTorch's, and a third more "
            "time or so",
        )
