"""Checkpoints of a training run: directories that are complete once they have their names.

    RUN/checkpoints/step-00000500/
        gptk.json, model.safetensors, tokenizer.tiktoken   the model, as gptk.load reads it
        averaged/                 the same with averaged weights, if a regularizer keeps them
        training.json             step, position in the data, best step so far
        training.safetensors      the optimizer's and the regularizers' tensors,
        shards/                   or these as torch.distributed.checkpoint wrote them (--shard)
        checksums.json            SHA-256 of all the files above

A checkpoint is written under a temporary name, synced to disk, and renamed. If the last checkpoint
does not match its checksums, a run goes on from the one before it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gptk.errors import TrainingError
from gptk.system.files import sync, write_text

_NAME = re.compile(r"step-(\d+)")
_READY = re.compile(r"\.step-(\d+)\.ready")
"""A complete checkpoint that is about to replace another one of the same step."""
_CHECKSUMS = "checksums.json"
STATE = "training.json"


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
        if later.name > target.name:
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


def best_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the lowest validation loss of a training run.

    The last checkpoint, if nothing was evaluated yet; None if the run has no checkpoint.
    """
    for path in reversed(_all(Path(run))):
        try:
            best = json.loads((path / STATE).read_text(encoding="utf-8"))["best_step"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: the checkpoint before it says which is the best
        by_step = {_step(checkpoint): checkpoint for checkpoint in _all(Path(run))}
        return by_step.get(best, path)
    return None


def last_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run, or None; its checksums are not compared."""
    found = _all(run)
    return found[-1] if found else None


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


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, wanted in sums.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _checksum(path / name) != wanted:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{_CHECKSUMS} cannot be read: {error}"
    return None
