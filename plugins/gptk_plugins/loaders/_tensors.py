"""What several loaders do with tensors."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import safetensors
import torch
from torch import Tensor

import gptk


def tie_equal_head(
    config: gptk.GPTConfig, state: dict[str, Tensor]
) -> tuple[gptk.GPTConfig, dict[str, Tensor]]:
    """Tie a head that was stored beside the embedding, if it is the same matrix."""
    if not config.tied_head and torch.equal(state["head.weight"], state["embed.weight"]):
        del state["head.weight"]
        config = replace(config, tied_head=True)
    return config, state


def safetensors_readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a safetensors file. Raises SourceError."""
    try:
        file = safetensors.safe_open(path, framework="pt")
        names: list[str] = file.keys()  # type: ignore[no-untyped-call]
        return {name: partial(file.get_tensor, name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        problem = "there is no such file" if not path.exists() else f"cut short or damaged: {error}"
        raise gptk.SourceError(f"{path}: {problem}") from None


def stored_as(state: Mapping[str, Tensor]) -> str:
    """The precisions of some tensors, for people: `bfloat16, float32`."""
    return ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in state.values()}))
