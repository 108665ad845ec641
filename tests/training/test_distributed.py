"""Several processes: with DDP and FSDP2 (over gloo) they train as a single process does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import gptk
import training_runs
from gptk.training.trainer import Trainer
from training_runs import SMALL, finish, in_child, in_processes

SETTINGS = SMALL | {
    "steps": 6,
    "eval_every": 3,
    "keep": 9,
    "regularizers": [
        "weight-decay",
        "grad-clip:max_norm=0.5",
        "label-smoothing",
        "z-loss:strength=0.01",
        "confidence-penalty",
        "l1:strength=1e-3",
        "ema:decay=0.5",
    ],
}


def records(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def assert_same_run(run, other, step=6):
    """Equal losses, norms, weights and averages, but for the last bits of sums."""
    for a, b in zip(records(run, "step"), records(other, "step"), strict=True):
        for key in ("loss", "objective", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)
        assert (a["lr"], a["tokens"]) == (b["lr"], b["tokens"])
    for a, b in zip(records(run, "evaluation"), records(other, "evaluation"), strict=True):
        for key in ("train_loss", "validation_loss"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)
    for name in ("model.safetensors", "averaged/model.safetensors"):
        a, b = (load_file(x / f"checkpoints/step-{step:08d}" / name) for x in (run, other))
        for key, weight in a.items():
            torch.testing.assert_close(weight, b[key], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """One process with batches of 4."""
    run = tmp_path_factory.mktemp("runs") / "single"
    finish(in_child(training_runs.train, SETTINGS, run))
    return run


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_processes(request, tmp_path_factory):
    """Two processes with batches of 2 each."""
    run = tmp_path_factory.mktemp("runs") / request.param
    settings = SETTINGS | {"batch_size": 2}
    in_processes(2, training_runs.train, settings, run, request.param == "fsdp2")
    return run


def test_two_processes_train_as_one_with_twice_the_batch(one_process, two_processes):
    assert_same_run(one_process, two_processes)


def test_one_process_writes(two_processes):
    assert len(records(two_processes, "evaluation")) == 3
    names = {path.name for path in (two_processes / "checkpoints/step-00000006").iterdir()}
    state = "shards" if two_processes.name == "fsdp2" else "training.safetensors"
    assert names == {
        "gptk.json",
        "model.safetensors",
        "tokenizer.tiktoken",
        "averaged",
        "training.json",
        "checksums.json",
        state,
    }
    assert gptk.load(str(two_processes)).generate("T", max_new_tokens=3).tokens


def cut(run, target):
    """A copy of a run as it was at step 3, saved by its processes."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints/step-00000006")
    return target


def test_a_run_saved_on_two_processes_goes_on_in_one(one_process, two_processes, tmp_path):
    run = cut(two_processes, tmp_path / "run")
    config = run / "config.toml"
    config.write_text(config.read_text().replace("batch_size = 2", "batch_size = 4"))
    trainer = Trainer.resume(run)
    assert trainer.step_count == 3
    trainer.train()
    assert_same_run(one_process, run)


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_a_run_saved_in_one_process_goes_on_in_two(shard, one_process, tmp_path):
    run = cut(one_process, tmp_path / "run")
    config = run / "config.toml"
    config.write_text(config.read_text().replace("batch_size = 4", "batch_size = 2"))
    in_processes(2, training_runs.train, SETTINGS, run, shard)
    assert_same_run(one_process, run)


@pytest.mark.slow
def test_accumulating_in_two_processes_is_the_same_again(one_process, tmp_path):
    settings = SETTINGS | {"batch_size": 1, "accumulate": 2, "eval_batches": 4}
    for shard in (False, True):
        run = tmp_path / f"run-{shard}"
        in_processes(2, training_runs.train, settings, run, shard)
        assert_same_run(one_process, run)


def test_torchrun_starts_them(one_process, tmp_path):
    run = tmp_path / "run"
    changes = SETTINGS | {"batch_size": 2}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    sets = [option.replace('"', "") if "[" not in option else option for option in sets]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = subprocess.run(
        [sys.executable, *launch, "-m", "gptk", "train", "--out", str(run), *sets],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert "2 processes" in out.stdout
    assert out.stdout.count("best validation loss") == 1
    assert_same_run(one_process, run)
