"""A GPT without memory: names and shapes of its parameters only."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gptk.model.config import GPTConfig
from gptk.model.gpt import GPT


def empty_gpt(config: GPTConfig) -> GPT:
    """A GPT on the device `meta`: no memory, no initialization."""
    with torch.device("meta"), _NoInitialization():
        return GPT(config)


class _NoInitialization(TorchFunctionMode):
    # Initializing parameters on `meta` does nothing, but imports 800 modules, which takes a second.
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        return func(*args, **kwargs)
