"""Writing files and directories atomically, and locking files.

What is written gets another name first, is synced to disk, and only then renamed: nobody sees it
incomplete.
"""

import contextlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
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
    try:
        target = Path(path).resolve()
        if files is not None:
            check_replaceable(target, what, files)
    except (OSError, RuntimeError, ValueError) as error:  # a path that cannot be: a loop of links
        raise SourceError(f"{path} cannot be written: {_reason(error)}") from None
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
        raise SourceError(f"{path} cannot be written: {_reason(error)}") from None
    except SourceError as error:  # raised by `write`, which knows only the temporary name
        raise SourceError(str(error).replace(str(new), str(path))) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Without the temporary name that a system's error may have."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


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


@dataclass(frozen=True)
class NewFile:
    """A file that is being written under a temporary name."""

    content: IO[bytes]
    path: Path
    """The temporary name."""

    def publish(self, target: Path) -> None:
        """Sync the file to disk, close it, and have it take the place of `target`.

        Raises OSError.
        """
        self.content.flush()
        os.fsync(self.content.fileno())
        self.content.close()
        with _naming(target):
            self.path.replace(target)
        sync(target.parent)


@contextlib.contextmanager
def new_file(folder: Path, name: str) -> Iterator[NewFile]:
    """A new file in a folder; removed at the end of the block unless it was published.

    name: what the temporary name is made of. A process that is killed leaves the file, see
    `remove_leftovers`. Raises OSError.
    """
    new = folder / f".{name}.{secrets.token_hex(4)}{_UNFINISHED}"
    try:
        with _naming(folder / name):
            file = new.open("xb")
        with file:
            yield NewFile(file, new)
    finally:
        with contextlib.suppress(OSError):  # of a disk that has become read-only, for example
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an OSError name this file: a temporary name would tell its reader nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` at the end of the block, synced to disk.

    A reader finds the old content or the new one. If the block raises, the old content stays.
    Raises OSError.
    """
    with new_file(path.parent, path.name) as new:
        yield new.content
        new.publish(path)


def write_text(path: Path, text: str) -> None:
    """Replace a small file by a text in UTF-8, as `replacing` does. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed, if they are older than a day."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):  # another process removed it
            if path.is_file() and time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


_UNFINISHED = ".new"


def lock(path: Path) -> IO[bytes] | None:
    """Lock a file against other processes and other threads, until the returned file is closed,
    which is open for reading and appending.

    Returns None if it is locked already. The system releases the lock when the process ends,
    however it ends. Raises OSError if the file cannot be opened or locked.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    file = path.open("a+b")
    try:
        _lock_open_file(file)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file


if sys.platform == "win32":

    def _lock_open_file(file: IO[bytes]) -> None:
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:

    def _lock_open_file(file: IO[bytes]) -> None:
        import fcntl

        # Belongs to the open file, not to the process: threads exclude each other, too.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
