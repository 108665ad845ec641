"""Reading and comparing stored tensors, for several loaders."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor

import gptk
from gptk_plugins.mapped_file import MappedFile

State = TypeVar("State", bound=MutableMapping[str, Any])


def tie_equal_head(config: gptk.GPTConfig, state: State) -> tuple[gptk.GPTConfig, State]:
    """Tie the head to the embedding if both were stored and are equal."""
    if not config.tied_head and _equal(state["embed.weight"], state["head.weight"]):
        del state["head.weight"]
        config = replace(config, tied_head=True)
    return config, state


def _equal(first: Tensor | gptk.Levels, second: Tensor | gptk.Levels) -> bool:
    if isinstance(first, gptk.Levels) and isinstance(second, gptk.Levels):
        return first.bits == second.bits and all(
            torch.equal(a, b)
            for a, b in (
                (first.codes, second.codes),
                (first.scale, second.scale),
                (first.offset, second.offset),
            )
        )
    if isinstance(first, gptk.Levels) or isinstance(second, gptk.Levels):
        return False
    return torch.equal(first, second)


def safetensors_readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a safetensors file. Raises SourceError."""
    try:
        file = MappedFile(path)
        with safetensors.safe_open(file.path, framework="pt") as opened:
            names: list[str] = opened.keys()
    except (OSError, safetensors.SafetensorError) as error:
        problem = "there is no such file" if not path.exists() else f"cut short or damaged: {error}"
        raise gptk.SourceError(f"{path}: {problem}") from None

    def read(name: str) -> Tensor:
        # Opened anew for each tensor, so that it has its own mapping; see MappedFile.bytes.
        with safetensors.safe_open(file.path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    return {name: partial(read, name) for name in names}


def read_torch_file(path: Path) -> dict[str, Any]:
    """A dict that torch.save wrote. Only tensors and plain containers are unpickled.

    Tensors are memory-mapped if the file's format allows it. Raises SourceError.
    """
    try:
        # Only the zip format, PyTorch's since 1.6, can be mapped.
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except FileNotFoundError:
        raise gptk.SourceError(f"{path}: there is no such file") from None
    except pickle.UnpicklingError:
        raise gptk.SourceError(
            f"{path} is cut short, or holds more than tensors; nothing in it was run"
        ) from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        reason = str(error).partition(".")[0].partition("\n")[0] or type(error).__name__
        raise gptk.SourceError(f"{path} is cut short or damaged: {reason}") from None
    if not isinstance(found, dict):
        raise gptk.SourceError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found


def torch_file_contains(path: str, *names: bytes) -> bool:
    """Whether a .pt or .pth file seems to contain entries of all these names."""
    if not path.endswith((".pth", ".pt")) or not os.path.isfile(path):
        return False
    # torch.save writes the names first and uncompressed, so no unpickling is needed.
    with open(path, "rb") as file:
        head = file.read(2**20)
    return all(name in head for name in names)


def state_readers(weights: Mapping[Any, Any]) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a state dict, by name, without the prefixes of torch.compile and
    data-parallel wrappers."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    return {
        str(name).removeprefix("_orig_mod.").removeprefix("module."): partial(same, tensor)
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor)
    }


def dtype_names(tensors: Iterable[Tensor]) -> str:
    """The dtypes of tensors, for display: `bfloat16, float32`."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
