"""Checkpoints of a training run: directories that are complete once they have their names.

    RUN/checkpoints/step-00000500/
        gptk.json, model.safetensors, tokenizer.tiktoken   the model, as gptk.load reads it
        averaged/                 the same with averaged weights, if a regularizer keeps them
        training.json             SavedProgress: step, position in the data, settings, …
        training.safetensors      the optimizer's and the regularizers' tensors,
        shards/                   or, with --shard, a file for each process's part of them
        checksums.json            SHA-256 of all the files above

A checkpoint is written under a temporary name, synced to disk, and renamed. If the last checkpoint
does not match its checksums, a run goes on from the one before it. No file of it is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from gptk.errors import SourceError, TrainingError
from gptk.system.files import sync, write_text
from gptk.system.metadata import ErrorType, Fields, open_regular, read_json

_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)
_READY = re.compile(r"\.step-(\d{8,18})\.ready", re.ASCII)
"""A complete checkpoint that is about to replace another one of the same step."""
_CHECKSUMS = "checksums.json"
STATE = "training.json"

Fingerprint = tuple[tuple[str, str], ...]
"""The name of each checkpoint of a run, and a hash of its checksums."""

_Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class SavedProgress(Fields):
    """The content of training.json."""

    format: Literal[2] = 2
    step: _Count
    epoch: _Count
    position: _Count
    """Training windows taken in the epoch."""
    tokens: _Count
    best_step: _Count | None
    best_loss: float | None
    evaluations_since_best: _Count
    processes: _Count
    data: list[str] | None
    """The SHA-256 of each token file; None for windows made by the caller."""
    settings: dict[str, Any]
    """The training configuration."""
    tensors: dict[str, str]
    """Dtype and shape of each tensor of the optimizer and the regularizers."""


def folder_of(run: Path) -> Path:
    """The directory of a run's checkpoints."""
    return run / "checkpoints"


def temporary(run: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of a step into, for `publish`."""
    new = folder_of(run) / f".{_name(step)}.new"
    clean(run)
    new.mkdir(parents=True)
    return new


def publish(new: Path, *, keep: int) -> Path:
    """Make a written checkpoint visible, and remove all but the last `keep` and the best one."""
    sums = {name: _checksum(new / name) for name in sorted(_files(new))}
    write_text(new / _CHECKSUMS, json.dumps(sums, indent=1))
    for path in (*new.rglob("*"), new):
        sync(path)
    run = new.parent.parent
    target = new.with_name(new.name.removeprefix(".").removesuffix(".new"))
    if target.exists():  # saved twice, or the run was resumed from an older checkpoint
        ready = new.with_suffix(".ready")
        new.rename(ready)
        sync(new.parent)
        _discard(target)
        new = ready
    new.rename(target)
    sync(new.parent)
    for later in _all(run):  # damaged ones: the run went on from a checkpoint before them
        if _step(later) > _step(target):
            _discard(later)
    keepers = {*_all(run)[-keep:], best_checkpoint(run)}
    for old in _all(run):
        if old not in keepers:
            _discard(old)
    return target


def newest_intact(run: Path, warn: Callable[[str], None]) -> Path:
    """The last checkpoint that matches its checksums; `warn` gets a line for each that does not.

    Raises TrainingError if there is none.
    """
    for path in reversed(_all(run)):
        problem = _damage(path)
        if problem is None:
            return path
        warn(f"{path} is damaged ({problem}); the checkpoint before it is used")
    raise TrainingError(f"{run} has no intact checkpoint to go on from; start anew with --out")


def read_progress(folder: Path) -> SavedProgress:
    """The training.json of a checkpoint. Raises TrainingError."""
    path = folder / STATE
    return SavedProgress.parse(read_json(path, TrainingError), path, TrainingError)


def best_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the lowest validation loss of a training run.

    The last checkpoint, if nothing was evaluated yet; None if the run has no checkpoint.
    """
    found = _all(Path(run))
    by_step = {_step(checkpoint): checkpoint for checkpoint in found}
    for path in reversed(found):
        try:
            best = read_progress(path).best_step
        except TrainingError:
            continue  # damaged: the checkpoint before it says which is the best
        return path if best is None else by_step.get(best, path)
    return None


def check_run_file(path: str | os.PathLike[str]) -> None:
    """Raise SourceError if a file in a checkpoint of a training run is not what the trainer wrote.

    It is read for its SHA-256, 0.1 s for 100 MB. A file that is in no such checkpoint passes.
    """
    path = Path(path)
    for folder in path.parents[:2]:  # the checkpoint, or the one that has it in averaged/
        if not ((folder / _CHECKSUMS).exists() or (folder / STATE).exists()):
            continue
        sums = read_json(folder / _CHECKSUMS)
        expected = sums.get(path.relative_to(folder).as_posix())
        if _checksum(path, SourceError) != expected:
            raise SourceError(
                f"{path} is damaged: it is not what the trainer wrote, by {_CHECKSUMS}; name "
                "another checkpoint of the run"
            )
        return


def fingerprint(run: Path) -> Fingerprint:
    """Tells whether checkpoints were added to a run, removed or replaced. Raises OSError."""
    return tuple((path.name, _fingerprint(path)) for path in _all(run))


def _fingerprint(path: Path) -> str:
    try:
        return _checksum(path / _CHECKSUMS)
    except TrainingError:  # damaged
        return ""


def clean(run: Path) -> None:
    """Finish an interrupted replacement, and remove what an interrupted save or removal left."""
    for path in folder_of(run).glob(".step-*.ready"):
        target = path.with_name(_name(_step(path)))
        if target.exists():
            _discard(target)
        path.rename(target)
    for path in folder_of(run).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _all(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by their steps."""
    folder = folder_of(run)
    if not folder.is_dir():
        return []
    paths = list(folder.iterdir())
    ready = {_step(path): path for path in paths if _READY.fullmatch(path.name)}
    named = {_step(path): path for path in paths if _NAME.fullmatch(path.name)}
    return [path for _, path in sorted((ready | named).items())]


def _step(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.name)))


def _discard(path: Path) -> None:
    # Renamed first, so that no checkpoint is visible while it is incomplete.
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != _CHECKSUMS:
            yield path.relative_to(folder).as_posix()


def _checksum(path: Path, error: ErrorType = TrainingError) -> str:
    with open_regular(path, error) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = read_json(path / _CHECKSUMS, TrainingError)
        found = {name for name in _files(path) if not Path(name).name.startswith(".")}
        if missing := sorted({STATE, *sums} - found):
            return f"{missing[0]} is missing"
        if unlisted := sorted(found - sums.keys()):
            return f"{unlisted[0]} is not in {_CHECKSUMS}"
        for name in sorted(found):
            if _checksum(path / name) != sums[name]:
                return f"{name} is not what was written"
    except (OSError, TrainingError) as error:
        return str(error)
    return None
