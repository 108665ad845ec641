"""The processes of a training run: one, or those that torchrun started.

Each process has the whole model (DDP), or with `shard` its part of every parameter (FSDP2).
"""

import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptk.errors import DeviceError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and its number among the others; in a single process most methods do nothing."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Its number on this machine, which is also its GPU's."""

    @classmethod
    def join(cls, device: str) -> "Processes":
        """Connect to the other processes if torchrun started this one. Raises DeviceError."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        this = cls(*(int(os.environ.get(name, 0)) for name in names))
        if not dist.is_initialized():
            on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
            if on_gpu:
                if this.local_rank >= torch.cuda.device_count():
                    raise DeviceError(
                        f"process {this.local_rank} of this machine has no GPU: there are "
                        f"{torch.cuda.device_count()}; start fewer with --nproc-per-node"
                    )
                torch.cuda.set_device(this.local_rank)
            dist.init_process_group("nccl" if on_gpu else "gloo")
        return this

    def leave(self) -> None:
        """Disconnect from the others when the run has ended."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The name of this process's device: its GPU, if `name` does not say which."""
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set in any process; all get the same answer."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)).item())

    def broadcast(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            dist.barrier()

    def parallelize(self, module: nn.Module, layers: nn.ModuleList, *, shard: bool) -> nn.Module:
        """`module` as data-parallel: sharded in place by layers (FSDP2), or wrapped in DDP."""
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            kind = next(module.parameters()).device.type
            mesh = init_device_mesh(kind, (self.count,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
            return module
        if self.count == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(module)


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside only accumulate gradients; one outside averages over processes."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    if isinstance(module, FSDPModule):
        return _UnsyncedShards(module)
    return nullcontext()


class _UnsyncedShards(AbstractContextManager[None]):
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._module.set_requires_gradient_sync(False)  # type: ignore[operator]

    def __exit__(self, *error: object) -> None:
        self._module.set_requires_gradient_sync(True)  # type: ignore[operator]


def reshard(module: nn.Module) -> None:
    """Free the whole parameters that FSDP2 gathered for forward passes without a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding; every process must call it."""
    gather = getattr(tensor, "full_tensor", None)  # only sharded tensors (DTensor) have it
    return tensor if gather is None else gather()


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, which may be sharded."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


def save_shards(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with torch.distributed.checkpoint, each process its own shards.

    Raises OSError, in every process, if any process could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), checkpoint_id=path)
    except CheckpointException as error:
        raise OSError("; ".join(str(failure) for failure, _ in error.failures.values())) from None


def load_shards(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors from what `save_shards` wrote, in any number of processes."""
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():  # torch warns of loading in a single process
        warnings.simplefilter("ignore", UserWarning)
        load(dict(tensors), checkpoint_id=path, no_dist=not dist.is_initialized())
