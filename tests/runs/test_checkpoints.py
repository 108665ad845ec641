"""A run goes on bit for bit after interrupted saves, damaged files and full disks."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import gptk
import training_runs
from gptk.runs import checkpoints
from gptk.runs.metrics import read_metrics
from gptk.training import shards
from gptk.training.trainer import Trainer
from training_runs import SMALL, STATEFUL, config, finish, in_child, same_state, wait_for


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


def empty_checksums(path):
    (path / "checksums.json").write_text("{}")


DAMAGE = {
    "cut short": lambda path: os.truncate(path / "training.safetensors", 100),
    "one byte changed": lambda path: flip(path / "model.safetensors"),
    "gone": lambda path: (path / "training.json").unlink(),
    "without checksums": lambda path: (path / "checksums.json").unlink(),
    "checksums of nothing": empty_checksums,
    "checksums that are a list": lambda path: (path / "checksums.json").write_text("[]"),
    "checksums that are numbers": lambda path: change_json(
        path / "checksums.json", {"model.safetensors": 1}
    ),
    "checksums nested deeply": lambda path: (path / "checksums.json").write_text("[" * 99999),
    "a file that was not written": lambda path: (path / "averaged").write_text("x"),
    "a FIFO": lambda path: (
        (path / "training.json").unlink(),
        os.mkfifo(path / "training.json"),
    ),
    "a folder": lambda path: (
        (path / "training.json").unlink(),
        (path / "training.json").mkdir(),
    ),
}


def change_json(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def sum_anew(folder):
    """Make the checksums of a checkpoint those of its files as they are."""
    (folder / "checksums.json").unlink(missing_ok=True)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "checksums.json").write_text(json.dumps(sums))


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


def test_the_checkpoint_that_an_error_names_is_intact(three, tmp_path):
    run = shutil.copytree(three, tmp_path / "run")
    trainer = Trainer.resume(run, ["steps=8"])
    flip(run / "checkpoints/step-00000006/model.safetensors")
    trainer.step = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    with pytest.raises(gptk.TrainingError, match=r"the last good checkpoint is \S+step-00000004,"):
        trainer.train()


LOADED = {
    "weights": ("model.safetensors", flip),
    "configuration": ("gptk.json", lambda path: change_json(path, {"extra": 1})),
    "tokenizer": ("tokenizer.tiktoken", lambda path: path.write_text("YQ== 0\n")),
    "no checksum": (
        "checksums.json",
        lambda path: change_json(
            path, {"model.safetensors": None, "averaged/model.safetensors": None}
        ),
    ),
    "no checksums": ("checksums.json", Path.unlink),
}


@pytest.mark.parametrize("what", LOADED)
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("whole_run", [True, False])
def test_a_damaged_file_of_a_run_is_not_loaded(what, averaged, whole_run, three, sharded, tmp_path):
    """As it is not resumed from: a flipped bit in the weights would only give worse texts."""
    run = shutil.copytree(sharded if averaged else three, tmp_path / "run")
    best = gptk.best_checkpoint(run)
    source = run if whole_run else best / "averaged" if averaged else best
    assert gptk.load(source).generate("a", max_new_tokens=1).tokens
    name, damage = LOADED[what]
    in_averaged = averaged and name != "checksums.json"
    file = best / "averaged" / name if in_averaged else best / name
    damage(file)
    with pytest.raises(gptk.SourceError) as caught:
        gptk.load(source).generate("a", max_new_tokens=1)
    told = best / "averaged" if averaged and what == "no checksum" else file.parent
    told = told / ("model.safetensors" if what == "no checksum" else name)
    assert str(caught.value).startswith(f"{told}")
    assert "\n" not in str(caught.value)


def test_files_that_were_taken_out_of_a_run_are_loaded_as_they_are(three, tmp_path):
    shutil.copytree(gptk.best_checkpoint(three), tmp_path / "model")
    for path in (tmp_path / "model").glob("training.*"):
        path.unlink()
    (tmp_path / "model/checksums.json").unlink()
    flip(tmp_path / "model/model.safetensors")
    assert gptk.load(tmp_path / "model").generate("a", max_new_tokens=1).tokens


def test_another_checkpoint_of_a_run_makes_a_model_loaded_from_it_an_old_one(three, tmp_path):
    run = shutil.copytree(three, tmp_path / "run")
    lm = gptk.load(run)
    assert lm.is_unchanged()
    later = run / "checkpoints/step-00000008"
    shutil.copytree(gptk.best_checkpoint(run), later)
    assert not lm.is_unchanged()
    shutil.rmtree(later)
    lm = gptk.load(run)
    flip(gptk.best_checkpoint(run) / "model.safetensors")
    assert not lm.is_unchanged()


class Planted:
    """An object whose pickle creates a file as it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A run of one process that writes its training state as shards."""
    run = tmp_path_factory.mktemp("runs") / "sharded"
    trainer = Trainer.start(config(steps=2, eval_every=2, regularizers=["ema"]), run)
    trainer.shard = True
    trainer.train()
    return run


@pytest.mark.parametrize(
    "kind",
    [
        "pickle",
        pytest.param("torch.save", marks=pytest.mark.slow),
        pytest.param("numpy", marks=pytest.mark.slow),
    ],
)
def test_nothing_in_a_run_is_unpickled(kind, sharded, tmp_path):
    """Each file of the run in turn is replaced by a pickle, with checksums that fit."""
    planted = tmp_path / "planted"
    payload = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Planted(planted), payload)
    elif kind == "torch.save":
        torch.save(Planted(planted), payload)
    else:
        np.save(payload, np.array([Planted(planted)], dtype=object), allow_pickle=True)
    checkpoint = Path("checkpoints/step-00000002")
    names = [path.relative_to(sharded) for path in sharded.rglob("*") if path.is_file()]
    assert checkpoint / "shards/00000.safetensors" in names
    for name in [*names, checkpoint / "shards/.metadata", checkpoint / "training.safetensors"]:
        run = tmp_path / "run"
        shutil.copytree(sharded, run)
        (run / name).write_bytes(payload.getvalue())
        sum_anew(run / checkpoint)
        with contextlib.suppress(gptk.GptkError):
            Trainer.resume(run).step()
        with contextlib.suppress(gptk.GptkError):
            gptk.load(str(run))
        with contextlib.suppress(gptk.GptkError):
            read_metrics(run / "metrics.jsonl")
        assert not planted.exists(), name
        shutil.rmtree(run)
    payload.seek(0)
    read = {
        "pickle": pickle.load,
        "torch.save": functools.partial(torch.load, weights_only=False),
        "numpy": functools.partial(np.load, allow_pickle=True),
    }
    read[kind](payload)
    assert planted.exists()  # the payload itself works


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "format is 1"),
        ({"step": "6"}, "step is '6'"),
        ({"step": -1}, "step is -1"),
        ({"epoch": True}, "epoch is True"),
        ({"position": 2**70}, "position is"),
        ({"best_step": [6]}, "best_step"),
        ({"best_loss": None, "best_step": None}, None),
        ({"data": "x"}, "data is 'x'"),
        ({"settings": []}, "settings is []"),
        ({"settings": {"depths": 3}}, "wrong settings: the training configuration has no option"),
        ({"settings": SMALL | {"lr": "fast"}}, "lr=fast is not allowed"),
        ({"tensors": {}}, "is not as training.json describes it"),
        ({"tensors": {"x": 1}}, "tensors"),
    ],
)
def test_a_training_json_of_wrong_types_is_told_by_its_field(change, words, three, tmp_path):
    run = shutil.copytree(three, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        change_json(folder / "training.json", change)
        sum_anew(folder)
    if words is None:
        assert Trainer.resume(run).best_step is None
        return
    with pytest.raises(gptk.TrainingError) as caught:
        Trainer.resume(run)
    assert words in str(caught.value)
    assert "/training." in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"optimizer.embed.weight.exp_avg": None},
        {"optimizer.embed.weight.exp_avg": torch.zeros(3)},
        {"optimizer.embed.weight.exp_avg": torch.zeros(257, 32, dtype=torch.int64)},
        {"optimizer.embed.weight.step": torch.zeros(2)},
        {"optimizer.embed.weight.x": torch.zeros(2)},
        {"optimizer.nothing.step": torch.zeros(())},
        {"x": torch.zeros(2)},
    ],
)
def test_a_training_state_that_does_not_fit_is_told(damage, three, tmp_path):
    """Also where training.json describes it, and the checksums are those of it."""
    run = shutil.copytree(three, tmp_path / "run")
    folder = run / "checkpoints/step-00000006"
    tensors = load_file(folder / "training.safetensors") | damage
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "training.safetensors")
    described = {
        name: f"{str(tensor.dtype)[6:]}{list(tensor.shape)}" for name, tensor in tensors.items()
    }
    change_json(folder / "training.json", {"tensors": described})
    sum_anew(folder)
    with pytest.raises(gptk.TrainingError, match=r"training\.safetensors cannot be read"):
        Trainer.resume(run)


class TestShards:
    """Files of parts, as the processes of a sharded run write them."""

    def write(self, folder, places, **tensors):
        folder.mkdir(exist_ok=True)
        name = f"{len(list(folder.iterdir())):05d}.safetensors"
        save_file(tensors, folder / name, {"gptk": json.dumps(places)})

    @given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 7), st.integers(0, 3))
    def test_parts_of_n_processes_are_read_by_m(self, tmp_path_factory, rows, n, m, width):
        folder = tmp_path_factory.mktemp("shards") / "shards"
        whole = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
        for start, part in divided(whole, n):
            self.write(folder, {"x": {"shape": [rows, width], "offset": start}}, x=part.clone())
        with shards.opened(folder) as stored:
            for start, part in divided(whole, m):
                mine = torch.full_like(part, -1.0)
                with mock.patch.object(shards, "_local_part", return_value=(mine, start)):
                    stored["x"].copy_into(whole)
                assert torch.equal(mine, part)

    @pytest.mark.parametrize(
        ("places", "words"),
        [
            ({}, "does not say where"),
            ({"x": {"shape": [4, 2], "offset": 0}, "y": {"shape": [1], "offset": 0}}, "does not"),
            ({"x": {"shape": [9, 2], "offset": 0}}, "missing or overlap"),
            ({"x": {"shape": [10**12, 2], "offset": 0}}, "missing or overlap"),
            ({"x": {"shape": [4, 2], "offset": 1}}, "missing or overlap"),
            ({"x": {"shape": [4, 3], "offset": 0}}, "do not fit together"),
            ({"x": {"shape": [], "offset": 0}}, "do not fit together"),
            ({"x": {"shape": [4, 2], "offset": -4}}, "does not say where"),
            ({"x": {"shape": "x", "offset": 0}}, "does not say where"),
        ],
    )
    def test_parts_that_do_not_make_up_a_tensor_are_refused(self, places, words, tmp_path):
        self.write(tmp_path / "shards", places, x=torch.zeros(4, 2))
        with pytest.raises(ValueError, match=words), shards.opened(tmp_path / "shards"):
            pass

    def test_parts_twice_are_refused(self, tmp_path):
        for _ in range(2):
            place = {"x": {"shape": [4, 2], "offset": 0}}
            self.write(tmp_path / "shards", place, x=torch.zeros(4, 2))
        with pytest.raises(ValueError, match="overlap"), shards.opened(tmp_path / "shards"):
            pass


def divided(tensor, count):
    """The parts of a tensor on `count` processes as torch.chunk, and so FSDP2, divides it."""
    size = -(-len(tensor) // count)
    starts = [min(rank * size, len(tensor)) for rank in range(count)]
    parts = [tensor[start : start + size] for start in starts]
    chunks = tensor.chunk(count) if len(tensor) else []
    assert all(map(torch.equal, parts, chunks))
    return zip(starts, parts, strict=True)


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
    trainer.close()
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
