"""What training needs beside the weights: the tensors of the optimizer and of the regularizers.

They stand in a checkpoint by name, `optimizer.PARAMETER.KEY` and `regularizer.NAME.KEY`: in
training.safetensors, or, where processes hold shards, as torch.distributed.checkpoint writes them.
Either is read in any number of processes.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptk.training import processes as distributed

_FILE, _SHARDS = "training.safetensors", "shards"

Stored = dict[str, tuple[str, list[int]]]
"""Dtype and shape of each tensor, by name."""


def collect(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    states: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """All tensors by name. states: those of each regularizer, by its name."""
    tensors = {
        f"optimizer.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    for name, state in states.items():
        tensors |= {f"regularizer.{name}.{key}": value for key, value in state.items()}
    return tensors


def describe(tensors: Mapping[str, Tensor]) -> Stored:
    """What `read` has to be told."""
    return {
        name: (str(one.dtype).removeprefix("torch."), list(one.shape))
        for name, one in tensors.items()
    }


def write(folder: Path, tensors: Mapping[str, Tensor], *, shard: bool, main: bool) -> None:
    """Write tensors; with `shard` each process writes its own parts, else the main one all."""
    if shard:
        distributed.save_shards(str(folder / _SHARDS), tensors)
    elif main:
        save_file({name: one.contiguous() for name, one in tensors.items()}, folder / _FILE)


def read(
    folder: Path,
    stored: Stored,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    states: Mapping[str, dict[str, Tensor]],
) -> None:
    """Put what was written into the optimizer and the regularizers' states.

    Those of a regularizer that is not there any more are left out.
    """
    wanted: dict[str, Tensor] = {}
    for name, (dtype_name, shape) in stored.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            owner, _, key = rest.rpartition(".")
            state: dict[str, Tensor] = optimizer.state[parameters[owner]]
        else:
            regularizer, _, key = rest.partition(".")
            if regularizer not in states:
                continue
            owner, state = key, states[regularizer]
        dtype = getattr(torch, dtype_name)
        like = parameters.get(owner)
        if like is not None and list(like.shape) == shape:  # sharded as the parameter is
            state[key] = torch.zeros_like(like, dtype=dtype).detach()
        else:
            device = next(iter(parameters.values())).device
            state[key] = torch.zeros(shape, dtype=dtype, device=device)
        wanted[name] = state[key]
    if (folder / _SHARDS).is_dir():
        distributed.load_shards(str(folder / _SHARDS), wanted)
        return
    with safe_open(folder / _FILE, framework="pt") as file:
        for name, tensor in wanted.items():
            distributed.put(tensor, file.get_tensor(name))
