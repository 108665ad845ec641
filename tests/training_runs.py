"""Small training runs, in this process and in others that tests may kill."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

import numpy as np

from gptk.training.config import TrainConfig
from gptk.training.trainer import Trainer

SMALL = {
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


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


def in_child(function, *args):
    """A started process that runs a function of this module."""
    child = _context.Process(target=function, args=args, daemon=True)  # ends with the tests
    child.start()
    return child


def finish(*children):
    for child in children:
        child.join(timeout=120)
        assert child.exitcode == 0, child.exitcode


def in_processes(count, function, *args):
    """Run a function in processes that meet as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(*(in_child(_as_rank, rank, count, port, function, *args) for rank in range(count)))


def _as_rank(rank, count, port, function, *args):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*args)


def train(settings, run, shard=False):
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


def train_until_killed(settings, run, at_step):
    """As `train`, but the process stays at a step until it is killed."""
    import torch

    torch.set_num_threads(1)
    trainer = Trainer.start(TrainConfig(**settings), run)
    step = trainer.step

    def waiting_step():
        if trainer.step_count == at_step:
            (Path(run) / "waits").touch()
            time.sleep(600)
        return step()

    trainer.step = waiting_step
    trainer.train()


def tokens(n, vocabulary=257, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, n).astype(np.uint16)


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
