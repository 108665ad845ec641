"""A GPT without memory: names and shapes of its parameters only."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gptk.errors import SourceError
from gptk.model.config import GPTConfig
from gptk.model.gpt import GPT


def empty_gpt(config: GPTConfig) -> GPT:
    """A GPT on the device `meta`: no memory, no initialization.

    Raises SourceError for sizes whose products are beyond what a tensor can have.
    """
    try:
        with torch.device("meta"), _NoInitialization():
            return GPT(config)
    except (RuntimeError, OverflowError, TypeError):  # what PyTorch raises for them
        sizes = ("vocab_size", "context_length", "width", "n_heads", "head_dim", "mlp_width")
        told = ", ".join(f"{name} {getattr(config, name):,}" for name in sizes)
        raise SourceError(f"no model can have these sizes: {told}") from None


class _NoInitialization(TorchFunctionMode):
    # Initializing parameters on `meta` does nothing, but imports 800 modules, which takes a second.
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        return func(*args, **kwargs)
