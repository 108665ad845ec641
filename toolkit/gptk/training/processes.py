"""The processes of a training run: one, or those that torchrun started.

Each process has the whole model (DDP), or with `shard` its part of every parameter (FSDP2).
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from gptk.errors import DeviceError, shown


@dataclass(frozen=True)
class Processes:
    """This process and its number among the others; in a single process most methods do nothing."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Its number on this machine, which is also its GPU's."""

    @classmethod
    def started(cls) -> "Processes":
        """This process by the numbers that torchrun gave it, if torchrun started it; not connected
        to the others. Raises DeviceError."""
        if not _by_torchrun():
            return cls()
        numbers = [os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        if not all(map(str.isdecimal, numbers)) or int(numbers[0]) >= int(numbers[1]):
            raise DeviceError(
                f"the variables RANK={shown(numbers[0])}, WORLD_SIZE={shown(numbers[1])} and "
                f"LOCAL_RANK={shown(numbers[2])} are not those that torchrun sets; unset them"
            )
        return cls(*map(int, numbers))

    @classmethod
    def join(cls, device: str) -> "Processes":
        """Connect to the other processes if torchrun started this one. Raises DeviceError."""
        this = cls.started()
        if _by_torchrun() and not dist.is_initialized():
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

    def sum(self, values: Sequence[float]) -> list[float]:
        """The elementwise sum over the processes, in float64."""
        if self.count == 1:
            return list(values)
        # A single process makes no tensor in float64, which MPS does not have.
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; all get the same answer."""
        return self.sum([flag])[0] > 0

    def broadcast(self, text: str) -> str:
        """The main process's text, in every process; what the others pass does not matter."""
        if self.count == 1:
            return text
        # Not broadcast_object_list, which pickles: nothing in gptk is unpickled.
        data = torch.tensor([*text.encode(errors="surrogateescape")], dtype=torch.uint8)
        length = torch.tensor(len(data), device=self._device)
        dist.broadcast(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8) if not self.main else data
        data = data.to(self._device)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode(errors="surrogateescape")

    @property
    def _device(self) -> str:
        """Where tensors are that the processes exchange."""
        return "cuda" if dist.get_backend() == "nccl" else "cpu"

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


def _by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


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
