"""Writing files and directories atomically, locking files, and syncing them to disk.

A directory is written under another name, synced, and only then renamed: nobody sees it incomplete.
"""

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

    files: the names that such a directory may have, of which it always has the first; by default
    the names that were just written. A directory at `path` is replaced if it is empty, or has the
    first of these names and no others. what: the kind of directory, for messages.

    Raises SourceError if something else is at `path`, or if it cannot be written; then nothing is
    changed.
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
            check_replaceable(target, what, sorted(file.name for file in new.iterdir()))
        for written in (*new.rglob("*"), new):
            sync(written)
        _replace(target, new)
        sync(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors' error for a full disk
        raise SourceError(f"{path} cannot be written: {error}") from None
    except SourceError as error:  # raised by `write`, which knows only the temporary name
        raise SourceError(str(error).replace(str(new), str(path))) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_replaceable(target: Path, what: str, files: Collection[str]) -> None:
    """Raises SourceError unless `target` is missing, an empty directory, or a directory with the
    first of `files` and no names but these."""
    if not target.exists():
        return
    found = {file.name for file in target.iterdir()} if target.is_dir() else {target.name}
    if found and (not target.is_dir() or next(iter(files)) not in found):
        raise SourceError(f"{target} exists and is no {what}; it is not overwritten")
    if others := sorted(found - set(files)):
        raise SourceError(
            f"{target} holds more than a {what} ({', '.join(others[:3])}); it is not overwritten"
        )


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: a reader finds the old or the new text. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)


def lock(path: Path) -> IO[bytes] | None:
    """Lock a file against other processes, until the returned file is closed.

    Returns None if another process has locked it. The system releases the lock when the process
    ends, however it ends. On Windows nothing is locked.
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
    """Flush a file or directory to disk. On Windows directories can't be, and are skipped."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(target: Path, new: Path) -> None:
    """Rename `new` to `target`; an old `target` is deleted only after that."""
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
