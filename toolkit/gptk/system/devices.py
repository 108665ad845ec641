"""Devices and dtypes by name, or chosen for `auto`."""

import functools
from typing import Any

import torch

from gptk.errors import DeviceError
from gptk.system.processor import features

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises DeviceError if this machine has no such device."""
    kinds = available()
    if name == "auto":
        return torch.device(kinds[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in kinds:
        raise DeviceError(f"no device {name!r} here; devices: auto, {', '.join(kinds)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def available() -> list[str]:
    """The kinds of device on this machine, the fastest first."""
    kinds = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]
    return [name for name, usable in kinds if usable] + ["cpu"]


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that supports it, else float32.

    On a CPU bfloat16 is faster if the processor supports it, but rounds so coarsely that a prompt's
    greedy text can depend on the other prompts of a batch; so it is not chosen there. Raises
    DeviceError for an unknown name.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise DeviceError(f"no dtype {name!r}; dtypes: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@functools.cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of a dtype about as fast as float32 ones on this CPU.

    In bfloat16 that takes AVX-512, in float16 AVX-512 FP16, or the like of other processors.
    Without these PyTorch converts numbers one by one.
    """
    if dtype == torch.float32:
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in name or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported: Any = getattr(torch.ops.mkldnn, name[dtype], None)
    return supported is not None and bool(supported())


@functools.cache
def has_bfloat16_instructions() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 numbers, faster than float32."""
    native = features() & {"avx512_bf16", "amx_bf16", "bf16"}
    return bool(native) and has_fast_products(torch.bfloat16)


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """For training: `auto` is bfloat16 if the hardware has instructions for it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return resolve_dtype(name, device)
    native = device.type == "cpu" and has_bfloat16_instructions()
    return torch.bfloat16 if native else torch.float32
