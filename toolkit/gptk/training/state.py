"""The tensors of a run: weights, and the states of the optimizer and the regularizers.

A checkpoint holds these states by the names `optimizer.PARAMETER.KEY` and `regularizer.NAME.KEY`,
in training.safetensors or, if the processes hold shards, in the format of
torch.distributed.checkpoint. Either can be read in any number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptk.hooks.training import Regularizer
from gptk.training import processes as distributed

_FILE, _SHARDS = "training.safetensors", "shards"

Stored = dict[str, tuple[str, list[int]]]
"""Dtype and shape of each tensor, by name."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """All tensors that a step changes."""

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    regularizers: Sequence[Regularizer]
    regularizer_states: Mapping[str, dict[str, Tensor]]
    """The tensors that each regularizer keeps from step to step, by the regularizer's name."""

    def whole_weights(self) -> dict[str, Tensor]:
        """All weights without sharding, on the CPU; every process must call it."""
        return whole(self.parameters)

    def averaged(self) -> Mapping[str, Tensor] | None:
        """The averaged weights of the first regularizer that has any."""
        for regularizer in self.regularizers:
            state = self.regularizer_states[regularizer.name]
            if state and (averaged := regularizer.averaged(state)) is not None:
                return averaged
        return None

    @contextmanager
    def replaced_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other weights in place of the trained ones within the block."""
        with torch.no_grad():
            trained = {name: self.parameters[name].detach().clone() for name in weights}
            for name, weight in weights.items():
                self.parameters[name].copy_(weight)
            try:
                yield
            finally:
                for name, weight in trained.items():
                    self.parameters[name].copy_(weight)

    def tensors(self) -> dict[str, Tensor]:
        """The states of the optimizer and the regularizers, by their names in a checkpoint."""
        tensors = {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        for name, state in self.regularizer_states.items():
            tensors |= {f"regularizer.{name}.{key}": value for key, value in state.items()}
        return tensors

    def read(self, folder: Path, stored: Stored) -> None:
        """Restore the states that `write` wrote.

        stored: what `describe` returned for them. States of regularizers that the run no longer has
        are left out.
        """
        wanted: dict[str, Tensor] = {}
        for name, (dtype_name, shape) in stored.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                parameter, _, key = rest.rpartition(".")
                state: dict[str, Tensor] = self.optimizer.state[self.parameters[parameter]]
            else:
                regularizer, _, key = rest.partition(".")
                if regularizer not in self.regularizer_states:
                    continue
                parameter, state = key, self.regularizer_states[regularizer]
            state[key] = self._empty(parameter, getattr(torch, dtype_name), shape)
            wanted[name] = state[key]
        if (folder / _SHARDS).is_dir():
            distributed.load_shards(str(folder / _SHARDS), wanted)
            return
        with safe_open(folder / _FILE, framework="pt") as file:
            for name, tensor in wanted.items():
                distributed.copy_whole(tensor, file.get_tensor(name))

    def _empty(self, parameter: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        """Zeros, sharded as the parameter of that name if there is one of the same shape."""
        like = self.parameters.get(parameter)
        if like is not None and list(like.shape) == shape:
            return torch.zeros_like(like, dtype=dtype).detach()
        device = next(iter(self.parameters.values())).device
        return torch.zeros(shape, dtype=dtype, device=device)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without sharding, on the CPU; every process must call it."""
    return {name: distributed.whole(tensor.detach()).cpu() for name, tensor in tensors.items()}


def describe(tensors: Mapping[str, Tensor]) -> Stored:
    """What `TrainingState.read` needs to know of tensors before it reads them."""
    return {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors.items()
    }


def write(folder: Path, tensors: Mapping[str, Tensor], *, shard: bool, main: bool) -> None:
    """Write tensors; with `shard` each process writes its parts, else the main process all."""
    if shard:
        distributed.save_shards(str(folder / _SHARDS), tensors)
    elif main:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _FILE)
