"""The tensors of a run: weights, and the states of the optimizer and the regularizers.

A checkpoint holds these states by the names `optimizer.PARAMETER.KEY` and `regularizer.NAME.KEY`,
in training.safetensors or, if the processes hold shards, in files of shards, see
`gptk.training.shards`. Either can be read in any number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from gptk.errors import TrainingError
from gptk.hooks.training import Regularizer
from gptk.runs.checkpoints import STATE
from gptk.training import shards
from gptk.training.shards import StoredTensor

StoredTensors = dict[str, str]
"""Dtype and shape of each tensor, such as `float32[4, 3]`, by name."""

_FILE, _SHARDS = "training.safetensors", "shards"
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, in the parameter's shape, beside the number of its steps."""


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

    def describe(self) -> StoredTensors:
        """What a checkpoint says of the tensors, to be compared with those in its files."""
        return {
            name: _about(value.dtype, list(value.shape)) for name, value in self.tensors().items()
        }

    def write(self, folder: Path, *, shard: bool, rank: int) -> None:
        """Write the tensors; with `shard` each process its parts, else the first process all.

        Raises OSError or SafetensorError.
        """
        if shard:
            shards.write_parts(folder / _SHARDS, self.tensors(), rank)
        elif rank == 0:
            shards.write_whole(folder / _FILE, self.tensors())

    def read(self, folder: Path, described: StoredTensors) -> None:
        """Restore what `write` wrote and `describe` described.

        States of regularizers that the run no longer has are left out. Raises TrainingError if
        the tensors are not those described, or do not fit the model.
        """
        source = folder / (_SHARDS if (folder / _SHARDS).is_dir() else _FILE)
        try:
            with shards.opened(source) as stored:
                found = {
                    name: _about(tensor.dtype, tensor.shape) for name, tensor in stored.items()
                }
                if differing := sorted(set(found.items()) ^ set(described.items())):
                    raise ValueError(f"{differing[0][0]} is not as {STATE} describes it")
                for name, tensor in stored.items():
                    self._read(name, tensor)
            self._check_optimizer()
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(f"{source} cannot be read: {error}") from None

    def _read(self, name: str, stored: StoredTensor) -> None:
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            parameter, _, key = rest.rpartition(".")
            like = self.parameters.get(parameter)
            if like is None or key not in ("step", *_MOMENTS):
                raise ValueError(f"{name} does not fit the model")
            shape = [] if key == "step" else list(like.shape)
            if (stored.shape, stored.dtype) != (shape, like.dtype):
                raise ValueError(f"{name} does not fit the model")
            state: dict[str, Tensor] = self.optimizer.state[like]
        elif kind == "regularizer":
            regularizer, _, key = rest.partition(".")
            if regularizer not in self.regularizer_states:
                return
            like, state = self.parameters.get(key), self.regularizer_states[regularizer]
            if like is not None and stored.shape != list(like.shape):
                raise ValueError(f"{name} does not fit the model")
        else:
            raise ValueError(f"{name} is neither of the optimizer nor of a regularizer")
        state[key] = self._empty(like, stored)
        stored.copy_into(state[key])

    def _empty(self, like: Tensor | None, stored: StoredTensor) -> Tensor:
        """Zeros for a stored tensor, sharded as the parameter `like` if that has its shape."""
        if like is not None and list(like.shape) == stored.shape:
            return torch.zeros_like(like, dtype=stored.dtype).detach()
        device = next(iter(self.parameters.values())).device
        return torch.zeros(stored.shape, dtype=stored.dtype, device=device)

    def _check_optimizer(self) -> None:
        """Raise ValueError unless each parameter has all of AdamW's state, or none."""
        for name, parameter in self.parameters.items():
            kept = self.optimizer.state.get(parameter, {}).keys()
            if kept and kept != {"step", *_MOMENTS}:
                raise ValueError(f"the optimizer's state of {name} is not complete")


def _about(dtype: torch.dtype, shape: list[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{shape}"


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without sharding, on the CPU; every process must call it."""
    return {name: shards.whole(tensor.detach()).cpu() for name, tensor in tensors.items()}
