"""A GPT of names and shapes alone."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gptk.model.config import GPTConfig
from gptk.model.gpt import GPT


def empty_gpt(config: GPTConfig) -> GPT:
    """A GPT on the device `meta`: names and shapes, no memory, no initialization."""
    with torch.device("meta"), _NoInitialization():
        return GPT(config)


class _NoInitialization(TorchFunctionMode):
    # Drawing normal numbers on `meta` does nothing but import 800 modules, for a second.
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        return func(*args, **kwargs)
