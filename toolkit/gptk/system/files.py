"""Files and directories that are there whole or not at all."""

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from gptk.errors import SourceError


def write_directory(
    path: str | os.PathLike[str],
    write: Callable[[Path], None],
    *,
    what: str,
    files: Collection[str] | None = None,
) -> None:
    """Have `write` fill an empty directory, sync it to disk, and put it at `path`.

    What is at `path` is replaced if it is the same kind of directory and nothing more: its
    entries are among `files`, the names that one may have, the first of them always (without
    `files`: among the names that were just written). what: the kind, for messages.

    Raises SourceError if `path` is anything else, or cannot be written; nothing is left behind.
    """
    target = Path(path).resolve()
    if files is not None:
        check_replaceable(target, what, files)
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        write(new)
        if files is None:
            check_replaceable(target, what, sorted(one.name for one in new.iterdir()))
        for written in (*new.rglob("*"), new):
            sync(written)
        _replace(target, new)
        sync(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors says so when the disk is full
        raise SourceError(f"{path} cannot be written: {error}") from None
    except SourceError as error:  # of `write`, which knows only the directory that it was given
        raise SourceError(str(error).replace(str(new), str(path))) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_replaceable(target: Path, what: str, files: Collection[str]) -> None:
    """That there is nothing, an empty directory, or what `files` make up, the first of them
    and no others. Raises SourceError."""
    if not target.exists():
        return
    found = {one.name for one in target.iterdir()} if target.is_dir() else {target.name}
    if found and (not target.is_dir() or next(iter(files)) not in found):
        raise SourceError(f"{target} is there and is no {what}; it is not overwritten")
    if others := sorted(found - set(files)):
        raise SourceError(
            f"{target} holds more than a {what} ({', '.join(others[:3])}); it is not overwritten"
        )


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole, the old or the new one. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)


def lock(path: Path) -> IO[bytes] | None:
    """Hold a file that no other process then holds, until what is returned is closed.

    Returns None if another has it. The system releases it when a process ends, however it ends.
    On Windows there is no such lock, and none is taken.
    """
    file = path.open("ab")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
    return file


def sync(path: Path) -> None:
    """Have the disk hold what was written; directories can't be synced on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(target: Path, new: Path) -> None:
    """Put `new` in the place of `target`; what was there goes only once `new` stands there."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_suffix(".old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
