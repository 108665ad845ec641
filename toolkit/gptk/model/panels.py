"""Plain weights in the layout that gptk's kernels multiply by: see gptk.kernels.panels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.model.levels import Levels
from gptk.system.memory import new_bytes


class Panels:
    """float32 or bfloat16 weights in panels of 16 outputs. No value is changed."""

    def __init__(self, weight: Tensor | Levels, dtype: torch.dtype) -> None:
        """weight: (outputs, inputs), see `can_be_panels`; it is converted to `dtype` a part at a
        time."""
        self.kind = str(dtype).removeprefix("torch.")
        self.outputs, inputs = weight.shape
        padded = self.outputs + -self.outputs % kernels.PANEL
        # Weights are read a quarter faster from huge pages. For float32, allocating that many may
        # take longer than is gained in a text of a hundred tokens.
        if dtype == torch.bfloat16:
            memory = new_bytes(padded * inputs * dtype.itemsize).view(dtype)
        else:
            memory = torch.empty(padded * inputs, dtype=dtype)
        self.numbers = memory.view(padded, inputs)
        """See `gptk.kernels.to_panels`."""
        step = max(1, _NUMBERS_AT_A_TIME // (kernels.PANEL * inputs)) * kernels.PANEL
        for start in range(0, self.outputs, step):
            part = weight[start : start + step]
            part = part.dense(dtype) if isinstance(part, Levels) else part.detach().to(dtype)
            kernels.to_panels(part.contiguous(), self.numbers[start : start + step])

    def __reduce__(self) -> tuple[type, tuple[Tensor, torch.dtype]]:
        return Panels, (self.dense(self.numbers.dtype), self.numbers.dtype)

    def __deepcopy__(self, memo: object) -> "Panels":
        return self  # never changed

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype is self.numbers.dtype:
            return kernels.linear_in_panels(x, self.numbers, self.outputs, bias)
        return F.linear(x, self.dense(x.dtype), bias)

    def linear_in_float32(self, x: Tensor) -> Tensor:
        """x times the weights, of which x has the dtype; the result is the same, in float32."""
        return kernels.linear_in_panels(x, self.numbers, self.outputs, None, in_float32=True)

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.numbers.new_empty(self.outputs, self.numbers.shape[1])
        kernels.from_panels(self.numbers, weight)
        return weight.to(dtype)

    def rows(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of the outputs with these numbers, (n,): (n, inputs).

        Raises IndexError for numbers of no output.
        """
        if len(outputs):
            low, high = outputs.aminmax()
            if not 0 <= low <= high < self.outputs:
                raise IndexError(f"rows from {low} to {high} of {self.outputs}")
        panels = self.numbers.view(torch.int32).view(-1, self.numbers[0].nbytes // 4, kernels.PANEL)
        lanes = panels[outputs // kernels.PANEL, :, outputs % kernels.PANEL]
        return lanes.view(self.numbers.dtype).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.outputs * self.numbers.shape[1] * self.numbers.itemsize

    @property
    def device(self) -> torch.device:
        return self.numbers.device


def can_be_panels(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether gptk's kernels take such weights, on this machine."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and len(shape) == 2
        and shape[1] > 0
        and shape[1] * dtype.itemsize % 4 == 0
        and kernels.available()
    )


_NUMBERS_AT_A_TIME = 1 << 18
"""Weights that are converted at a time, so that intermediate tensors stay in the caches."""
