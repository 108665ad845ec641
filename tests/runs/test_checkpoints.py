"""A run goes on bit for bit after interrupted saves, damaged files and full disks."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import gptk
import training_runs
from gptk.runs import checkpoints
from gptk.training.trainer import Trainer
from training_runs import SMALL, config, finish, in_child, wait_for

# Dropout and averages, so that random numbers and a regularizer's state have to go on, too.
STATEFUL = SMALL | {
    "regularizers": ["weight-decay", "grad-clip", "dropout:p=0.1", "ema:decay=0.9"],
    "accumulate": 2,
}


def same_state(run, other):
    """Whether two runs ended with the same bits: weights, optimizer, averages, metrics."""
    for name in ("model.safetensors", "training.safetensors", "averaged/model.safetensors"):
        a = load_file(run / "checkpoints/step-00000020" / name)
        b = load_file(other / "checkpoints/step-00000020" / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)
    drop = {"tokens_per_second": 0, "seconds": 0}
    metrics = [
        [json.loads(line) | drop for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, other)
    ]
    assert metrics[0] == metrics[1]
    assert (run / "samples.txt").read_text() == (other / "samples.txt").read_text()


@pytest.mark.parametrize("killed_at", [10, 13])
def test_a_killed_run_goes_on_bit_for_bit(killed_at, tmp_path):
    straight = in_child(training_runs.train, STATEFUL, tmp_path / "straight")
    killed = in_child(training_runs.train_until_killed, STATEFUL, tmp_path / "killed", killed_at)
    wait_for(tmp_path / "killed/waits")
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    finish(straight, in_child(training_runs.train, STATEFUL, tmp_path / "killed"))
    same_state(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.slow
def test_sigkill_at_random_moments_of_saving_never_leaves_a_run_that_cannot_go_on(tmp_path):
    """Every step saves, 50 kills interrupt a save; the run ends as if it had not been killed."""
    settings = SMALL | {
        "steps": 100_000,  # more than any machine gets to
        "save_every": 1,
        "eval_every": 100_000,
        "eval_batches": 1,
        "sample_tokens": 0,
        "n_layers": 1,
        "keep": 2,
    }
    run = tmp_path / "run"
    chance = random.Random(0)
    kills, cut, steps = 0, 0, 0
    while cut < 50:
        child = in_child(training_runs.train, settings, run)
        if kills % 2 == 0:  # every other run gets a step further, however slow the machine
            wait_for_step_after(run, steps)
        wait_for_save(run, files=chance.randint(0, 6))
        time.sleep(chance.uniform(0, 0.005))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        cut += bool(unfinished(run))
        lines = []
        newest = checkpoints.newest_intact(run, lines.append)
        assert not lines
        assert gptk.best_checkpoint(run) is not None
        steps = int(newest.name.removeprefix("step-"))
        assert kills < 200, f"only {cut} of {kills} kills cut a save"
    print(f"{cut} of {kills} kills cut a save, the last after step {steps}")
    trainer = Trainer.resume(run, [f"steps={steps + 2}"])
    assert trainer.step_count == steps
    assert trainer.train() == "finished"
    assert not unfinished(run)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found if record["kind"] == "step"] == list(
        range(1, steps + 3)
    )


def wait_for_step_after(run, step):
    """Older checkpoints are deleted meanwhile, so any newer one will do."""
    end = time.monotonic() + 60
    while not any(int(path.name[5:]) > step for path in run.glob("checkpoints/step-????????")):
        assert time.monotonic() < end, f"no checkpoint after step {step}"
        time.sleep(0.01)


def wait_for_save(run, files):
    """Until a checkpoint is being written that has so many of its six files."""
    end = time.monotonic() + 60
    while unfinished(run):  # what a kill left, which goes first, or a save that is under way
        assert time.monotonic() < end, "what a kill left is still there"
    while not any(count >= files for count in unfinished(run)):
        assert time.monotonic() < end, "nothing was saved"


def unfinished(run):
    """The number of files in each checkpoint that is being written or removed."""
    counts = []
    for folder in run.glob("checkpoints/.step-*"):
        with contextlib.suppress(FileNotFoundError):  # removed after glob found it
            counts.append(len(list(folder.iterdir())))
    return counts


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run with three checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "three"
    Trainer.start(config(steps=6, save_every=2, eval_every=6, keep=3), run).train()
    return run


DAMAGE = {
    "cut short": lambda path: os.truncate(path / "training.safetensors", 100),
    "one byte changed": lambda path: flip(path / "model.safetensors"),
    "gone": lambda path: (path / "training.json").unlink(),
    "without checksums": lambda path: (path / "checksums.json").unlink(),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, three, tmp_path):
    run = shutil.copytree(three, tmp_path / "run")
    DAMAGE[damage](run / "checkpoints/step-00000006")
    lines = []
    trainer = Trainer.resume(run, warn=lines.append)
    assert trainer.step_count == 4
    (line,) = lines
    assert "step-00000006 is damaged (" in line
    assert "\n" not in line
    trainer.step()
    saved = trainer.save()
    assert gptk.best_checkpoint(run) is not None
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[-1] == saved.name == "step-00000005"  # the damaged one does not outrank it
    assert trainer.train() == "finished"


def test_a_run_of_nothing_but_damaged_checkpoints_is_an_error(three, tmp_path):
    run = shutil.copytree(three, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    with pytest.raises(gptk.TrainingError, match="has no intact checkpoint"):
        Trainer.resume(run, warn=lambda line: None)


class Killed(BaseException):
    """Imitates a kill: no handler of Exception catches it."""


@pytest.mark.parametrize("moment", range(8))
def test_a_step_saved_twice_has_a_good_checkpoint_at_every_moment(moment, tmp_path, monkeypatch):
    """Killed before each of the renames and removals, with a single checkpoint."""
    run = tmp_path / "run"
    trainer = Trainer.start(config(keep=1), run)
    trainer.step()
    trainer.save()
    left = [moment]

    def until_killed(function):
        def call(*args, **keywords):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args, **keywords)

        return call

    monkeypatch.setattr(checkpoints.Path, "rename", until_killed(checkpoints.Path.rename))
    monkeypatch.setattr(shutil, "rmtree", until_killed(shutil.rmtree))
    with contextlib.suppress(Killed):
        trainer.save()
    monkeypatch.undo()
    assert gptk.load(str(run)).model.config == trainer.model.config
    again = Trainer.resume(run, warn=pytest.fail)
    assert again.step_count == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_too_little_memory_to_resume_is_an_error_of_one_line(three, tmp_path, monkeypatch):
    run = shutil.copytree(three, tmp_path / "run")
    monkeypatch.setattr("gptk.training.preparation.build_model", lambda *_: torch.empty(2**60))
    with pytest.raises(gptk.TrainingError, match=r"^out of memory for the model"):
        Trainer.resume(run)


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(gptk.TrainingError, match="is not a training run"):
        Trainer.resume(tmp_path)


def fill_disk_at(monkeypatch, step):
    """From the checkpoint of that step on nothing can be written, as on a full disk."""
    write = checkpoints.write_text

    def full(path, text):
        if path.parent.name == f".step-{step:08d}.new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(checkpoints, "write_text", full)


def test_a_full_disk_ends_with_a_clear_error_and_the_last_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = Trainer.start(config(save_every=3, eval_every=20), run)
    fill_disk_at(monkeypatch, 6)
    with pytest.raises(gptk.TrainingError) as caught:
        trainer.train()
    assert str(caught.value).startswith(
        "the checkpoint of step 6 cannot be written: [Errno 28] No space left on device; the last "
        f"good checkpoint is {run}/checkpoints/step-00000003"
    )
    monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert Trainer.resume(run).train() == "finished"


@pytest.mark.parametrize(("limit", "shard"), [(1000, False), (60_000, False), (60_000, True)])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_file_that_cannot_grow_is_an_error(limit, shard, tmp_path):
    """The operating system limits the size of files, for the settings or for a checkpoint."""
    run = tmp_path / "run"
    trainer = Trainer.start(config(save_every=3, eval_every=20), run)
    # A single process has no shards, but can write in their format.
    trainer.shard = shard
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        # torch.distributed.checkpoint has another message.
        what = "checkpoint of step 3 cannot be written" if shard else "File too large"
        with pytest.raises(gptk.TrainingError, match=what):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list((run / "checkpoints").glob(".*")) == []
