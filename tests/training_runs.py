"""Small training runs, in this process and in others that tests may kill."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from gptk.training.config import TrainConfig
from gptk.training.trainer import Trainer

SMALL: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 2,
    "width": 32,
    "context_length": 16,
    "batch_size": 4,
    "steps": 20,
    "eval_every": 10,
    "eval_batches": 2,
    "sample_tokens": 4,
    "sample_prompt": "T",
    "log_every": 1,
    "dtype": "float32",
    "device": "cpu",
    "scheduler": "warmup-cosine:warmup=5",
}

# Children start from a process that has imported torch and computed nothing.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["gptk.training.trainer", "gptk_plugins", "gptk.plots.runs", "training_runs"]
)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


def in_child(function: Callable[..., object], *args: object) -> BaseProcess:
    """A started process that runs a function of this module."""
    child = _context.Process(target=function, args=args, daemon=True)  # ends with the tests
    child.start()
    return child


def finish(*children: BaseProcess) -> None:
    for child in children:
        child.join(timeout=120)
        assert child.exitcode == 0, child.exitcode


def in_processes(count: int, function: Callable[..., object], *args: object) -> None:
    """Run a function in several processes, which connect as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(*(in_child(_as_rank, rank, count, port, function, *args) for rank in range(count)))


def _as_rank(
    rank: int, count: int, port: int, function: Callable[..., object], *args: object
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*args)


def train(settings: Mapping[str, Any], run: str | Path, shard: bool = False) -> None:
    """Start a run, or go on with it, and train to its end."""
    import torch

    torch.set_num_threads(1)
    run = Path(run)
    if (run / "checkpoints").is_dir() and any((run / "checkpoints").glob("step-*")):
        trainer = Trainer.resume(run, shard=shard)
    else:
        trainer = Trainer.start(TrainConfig(**settings), run, shard=shard)
    trainer.train()
    trainer.processes.leave()


def train_until_killed(settings: Mapping[str, Any], run: str | Path, at_step: int) -> None:
    """As `train`, but the process waits at a step until it is killed."""
    import torch

    torch.set_num_threads(1)
    trainer = Trainer.start(TrainConfig(**settings), run)
    step = trainer.step

    def waiting_step() -> dict[str, Any]:
        if trainer.step_count == at_step:
            (Path(run) / "waits").touch()
            time.sleep(600)
        return step()

    trainer.step = waiting_step  # type: ignore[method-assign]
    trainer.train()


def tokens(n: int, vocabulary: int = 257, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, n).astype(np.uint16)


def wait_for(path: str | Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
