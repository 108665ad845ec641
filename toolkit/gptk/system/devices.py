"""Devices and dtypes by name, or chosen for `auto`."""

import torch

from gptk.errors import DeviceError

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


def resolve_dtype(name: str, device: torch.device, *, quantized: bool = False) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that supports it and for quantized weights, else float32.

    On a CPU bfloat16 is faster if the processor supports it, but rounds so coarsely that a prompt's
    greedy text can depend on the other prompts of a batch; so it is not chosen there. With
    quantized weights it is chosen all the same: PyTorch's kernels for them take nothing else, and
    prefill is faster. Raises DeviceError for an unknown name.
    """
    if name == "auto" and quantized:
        return torch.bfloat16
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise DeviceError(f"no dtype {name!r}; dtypes: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """For training: `auto` is bfloat16 if the hardware has instructions for it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return resolve_dtype(name, device)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32
