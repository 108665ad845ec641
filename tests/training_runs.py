"""Small training runs, in this process and in others that tests may kill."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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

# Dropout and averages, so that random numbers and a regularizer's state have to go on, too.
STATEFUL = SMALL | {
    "regularizers": ["weight-decay", "grad-clip", "dropout:p=0.1", "ema:decay=0.9"],
    "accumulate": 2,
}


def same_state(run: Path, other: Path) -> None:
    """Check that two runs ended with the same bits: weights, optimizer, averages, metrics."""
    from safetensors.torch import load_file

    for name in ("model.safetensors", "training.safetensors", "averaged/model.safetensors"):
        a = load_file(run / "checkpoints/step-00000020" / name)
        b = load_file(other / "checkpoints/step-00000020" / name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].equal(b[key]), (name, key)
    drop = {"tokens_per_second": 0, "seconds": 0}
    metrics = [
        [json.loads(line) | drop for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, other)
    ]
    assert metrics[0] == metrics[1]
    assert (run / "samples.txt").read_text() == (other / "samples.txt").read_text()


VALUES: dict[str, Any] = {
    "architecture": "gpt2",
    "data": ["a.txt"],
    "validation_data": ["b.txt"],
    "regularizers": ["l1:strength=0.1"],
    "observers": ["tensorboard"],
    "betas": (0.5, 0.75),
    "dtype": "float32",
    "train_ratio": 0.5,
    "on_nan": "skip",
}


def value_of(name: str) -> Any:
    """A value of a setting that is not the default."""
    if name in VALUES:
        return VALUES[name]
    default = TrainConfig.model_fields[name].default
    if isinstance(default, bool) or name == "qkv_bias":
        return not default
    if isinstance(default, str) or name in ("model", "tokenizer"):
        return "x"
    return (default or 4) * 2


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


def train_counting(settings: Mapping[str, Any], run: str | Path, report: Path) -> None:
    """As `train`; writes how many changes of files it made, and how many seconds it took."""
    changes = 0

    def count(_: str) -> None:
        nonlocal changes
        changes += 1

    start = time.monotonic()
    with before_each_change(count):
        train(settings, run)
    report.write_text(json.dumps({"changes": changes, "seconds": time.monotonic() - start}))


def train_until_change(
    settings: Mapping[str, Any], run: str | Path, number: int, report: Path
) -> None:
    """As `train`, but the process kills itself before it changes files for that time."""
    left = number

    def kill(what: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            report.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_change(kill):
        train(settings, run)


@contextlib.contextmanager
def before_each_change(call: Callable[[str], None]) -> Iterator[None]:
    """Call a function with what is about to happen before each change of a file.

    Before it is opened for writing, renamed, removed or synced, or a folder is made or removed;
    not before its content is written.
    """
    inside = True
    changing = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
    sync = os.fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal inside
        writes = event == "open" and bool(set(str(arguments[1])) & set("wax+"))
        if inside and (writes or event in changing):
            inside = False  # what the function does itself does not count
            call(event)
            inside = True

    def noting_sync(fd: Any) -> None:
        call("os.fsync")
        sync(fd)

    sys.addaudithook(hook)  # stays until the process ends, see `inside`
    os.fsync = noting_sync
    try:
        yield
    finally:
        inside, os.fsync = False, sync


def tokens(n: int, vocabulary: int = 257, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, n).astype(np.uint16)


def wait_for(path: str | Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
