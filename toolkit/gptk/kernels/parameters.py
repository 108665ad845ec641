"""What a kernel may take: the parts of a gptk.kernels.door.Signature.

Texts are Python expressions, in which the names of arguments and sizes stand for their values. So a
message can show what a kernel needs.
"""

from dataclasses import dataclass

import torch

BFLOAT16, FLOAT32, UINT8 = torch.bfloat16, torch.float32, torch.uint8
INT32, INT64 = torch.int32, torch.int64
FLOATS = (FLOAT32, BFLOAT16)


@dataclass(frozen=True)
class Input:
    """A tensor on the CPU that a kernel reads."""

    name: str
    dims: str | None = None
    """Its sizes, such as "rows, 2 * size". A name that is not known yet takes the tensor's size.
    "..." at the beginning: any sizes; `rows` is their product. None: any shape."""
    dtype: tuple[torch.dtype, ...] | str = FLOATS
    """What it may be, or an expression for what it must be."""
    strides: str | None = None
    """As `dims`; "_" for any. A stride does not matter where there is one number. None: there are
    no gaps between numbers."""
    optional: bool = False
    """It may be None, which C++ gets as a null pointer. The sizes it would have named are 0 then.
    """
    copied: bool = True
    """Whether a tensor with gaps is copied; else it is refused. Not where strides are declared."""


@dataclass(frozen=True)
class Written(Input):
    """A tensor that a kernel writes, or reads and writes. No other tensor may overlap it."""

    copied: bool = False


@dataclass(frozen=True)
class Result:
    """A tensor that the door makes, and returns."""

    name: str
    dims: str | None
    """As `Input.dims`, of known names. None: the shape of the first tensor."""
    dtype: str
    """An expression."""


@dataclass(frozen=True)
class Int:
    """An integer. What it may be is said by `Signature.where`."""

    name: str


@dataclass(frozen=True)
class Real:
    """A number, float64 in C++."""

    name: str


@dataclass(frozen=True)
class Dtype:
    """torch.float32 or torch.bfloat16."""

    name: str


@dataclass(frozen=True)
class Made:
    """What was checked when it was made. C++ gets its `address`."""

    name: str
    type: type
    has_regions: bool = False
    """It has `regions`, see gptk.kernels.regions: no tensor that a kernel writes shares them."""
    is_written: bool = False
    """A kernel writes there: no tensor at all shares them."""


Parameter = Input | Written | Result | Int | Real | Dtype | Made
