"""What several loaders do with tensors."""

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
    """Tie a head that was stored beside the embedding, if it is the same matrix."""
    if not config.tied_head and _equal(state["embed.weight"], state["head.weight"]):
        del state["head.weight"]
        config = replace(config, tied_head=True)
    return config, state


def _equal(one: Tensor | gptk.Levels, other: Tensor | gptk.Levels) -> bool:
    if isinstance(one, gptk.Levels) and isinstance(other, gptk.Levels):
        return one.bits == other.bits and all(
            torch.equal(a, b)
            for a, b in (
                (one.codes, other.codes),
                (one.scale, other.scale),
                (one.offset, other.offset),
            )
        )
    if isinstance(one, gptk.Levels) or isinstance(other, gptk.Levels):
        return False
    return torch.equal(one, other)


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
        # Opened again for each tensor, which then has a mapping of its own: see MappedFile.bytes.
        with safetensors.safe_open(file.path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    return {name: partial(read, name) for name in names}


def read_torch_file(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors and plain containers, nothing else is unpickled.

    Tensors are mapped where the file allows. Raises SourceError.
    """
    try:
        # Only the zip format, PyTorch's since 1.6, can be mapped instead of read.
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except FileNotFoundError:
        raise gptk.SourceError(f"{path}: there is no such file") from None
    except pickle.UnpicklingError:
        raise gptk.SourceError(
            f"{path} is cut short, or holds more than tensors; nothing in it was run"
        ) from None
    except Exception as error:  # on a damaged file the unpickler stumbles in many ways
        reason = str(error).partition(".")[0].partition("\n")[0] or type(error).__name__
        raise gptk.SourceError(f"{path} is cut short or damaged: {reason}") from None
    if not isinstance(found, dict):
        raise gptk.SourceError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found


def torch_file_names(path: str, *names: bytes) -> bool:
    """Whether a .pt or .pth file seems to hold something by each of some names."""
    if not path.endswith((".pth", ".pt")) or not os.path.isfile(path):
        return False
    # torch.save writes the names first and uncompressed: they are found without unpickling.
    with open(path, "rb") as file:
        head = file.read(2**20)
    return all(name in head for name in names)


def state_readers(weights: Mapping[Any, Any]) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a state dict, by its name without what torch.compile and
    data-parallel wrappers put before it."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    return {
        str(name).removeprefix("_orig_mod.").removeprefix("module."): partial(same, tensor)
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor)
    }


def stored_as(tensors: Iterable[Tensor]) -> str:
    """The precisions of some tensors, for people: `bfloat16, float32`."""
    return ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in tensors}))
