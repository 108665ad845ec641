"""Checks of what kernels are called with.

C++ gets addresses, and reads and writes there what shapes and dtypes promise. So each function that
calls a kernel checks them, in a way that costs less than a microsecond, and raises ValueError
rather than let the process crash.
"""

from typing import NoReturn

import torch
from torch import Tensor

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
INT32, INT64 = torch.int32, torch.int64


def are_floats(a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> bool:
    """Whether all are on the CPU and of one dtype, float32 or bfloat16."""
    dtype = a.dtype
    return (
        (dtype is FLOAT32 or dtype is BFLOAT16)
        and a.is_cpu
        and (b is None or (b.dtype is dtype and b.is_cpu))
        and (c is None or (c.dtype is dtype and c.is_cpu))
    )


def are(dtype: torch.dtype, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> bool:
    """Whether all are on the CPU and of that dtype."""
    return (
        a.dtype is dtype
        and a.is_cpu
        and (b is None or (b.dtype is dtype and b.is_cpu))
        and (c is None or (c.dtype is dtype and c.is_cpu))
    )


def refuse(kernel: str, **arguments: object) -> NoReturn:
    """Raise ValueError with the arguments that a kernel cannot take."""
    got = ", ".join(f"{name}: {_described(value)}" for name, value in arguments.items())
    raise ValueError(f"gptk.kernels.{kernel} cannot take {got}; its docstring says what it takes")


def fail(status: int) -> NoReturn:
    """Raise the exception for a Status that a kernel returned, see cpp/common.h."""
    if status == 1:
        raise MemoryError("there is too little memory for a kernel's intermediate numbers")
    if status == 2:
        raise ValueError("a number is out of range: a code beyond its bits, or a target token")
    raise ValueError("a tensor has no data: it is a tracer's or a wrapper, or its memory is freed")


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(value.shape)} with strides {value.stride()} on {value.device}"
