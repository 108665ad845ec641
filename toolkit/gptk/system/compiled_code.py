"""Machine code that gptk compiles, keeps on disk, and loads into its process.

Whoever can write such a file can run code as the user who loads it. So it lies in a folder that
belongs to the user and that nobody else can write, as ssh asks of the folder of its keys; and a
record beside it has its SHA-256, so that code which is damaged, cut short or foreign is not loaded
but made again.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gptk.system.caches import cache_folder
from gptk.system.files import sync
from gptk.system.notices import tell_once
from gptk.system.private_files import make_private, read_private

Loaded = TypeVar("Loaded")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Code:
    """Code that can be made, and what it depends on."""

    name: str
    """Its file's name begins with this."""
    origin: Mapping[str, str]
    """All that it depends on; other values are other code."""
    make: Callable[[Path], None]
    """Writes it to a path, which ends with .so, in an empty folder."""


def load_or_make(code: Code, load: Callable[[Path], Loaded]) -> Loaded:
    """Load code that was kept; or make, keep and load it.

    load: loads a file, and raises OSError or AttributeError if it is not what it should be; then it
    is made again, once. Processes and threads that need the same code at the same time wait for the
    first to make it. A line in the log says why code that was found is not loaded, and where it is
    kept if not in the cache folder.

    Raises what `make` and `load` raise, and PermissionError if there is no folder for the code.
    """
    problems: list[str] = []
    for folder in _folders(problems):
        found = _load(folder, code, load)
        if not isinstance(found, _Unusable):
            _log.info("%s loaded from %s", code.name, folder)
            return found
        if not os.access(folder, os.W_OK | os.X_OK):
            problems.append(f"{folder} cannot be written")
            continue
        with _locked(folder / f"{code.name}.lock"):
            found = _load(folder, code, load)  # another process may have made it meanwhile
            if not isinstance(found, _Unusable):
                return found
            if found.reason:
                _log.warning("%s is not loaded, and is made again: %s", found.path, found.reason)
            path = _make(folder, code)
            _log.info("%s compiled, and kept in %s", code.name, folder)
            try:
                return load(path)
            except BaseException:  # it is no good, and is not kept
                for file in (path, _record(folder, code)):
                    file.unlink(missing_ok=True)
                raise
    raise PermissionError(f"compiled code cannot be kept: {'; '.join(problems)}")


def use_private_inductor_folder() -> None:
    """Have TorchInductor keep its files where nobody else can write them.

    It loads compiled code and pickles from `torchinductor_USER` in the directory for temporary
    files, whoever made that folder. If others can write there, a folder beside gptk's own code is
    used, and a line in the log says so. Call this before anything is compiled. Does nothing if
    $TORCHINDUCTOR_CACHE_DIR names another folder. Raises OSError if there is no private folder.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = default_cache_dir()
    # TorchInductor itself sets the variable to its default.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) != default:
        return
    problem = make_private(Path(default))
    if problem is None:
        return
    problems = [problem]
    for folder in _folders(problems):
        if os.access(folder, os.W_OK | os.X_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
            _log.warning("TorchInductor's files are kept in %s/inductor: %s", folder, problem)
            return
    raise PermissionError(f"compiled code cannot be kept: {'; '.join(problems)}")


def _folders(problems: list[str]) -> Iterator[Path]:
    """The folders for compiled code, made if need be and checked to be private.

    They are `code` in the cache folder and, should that not do, a folder in the directory for
    temporary files. problems: why a folder will not do; it may be added to between the folders.
    """
    folder = cache_folder() / "code"
    if (problem := make_private(folder)) is None:
        yield folder.resolve()
    else:
        problems.append(problem)
    try:
        folder = Path(tempfile.gettempdir()) / f"gptk-{_user()}"
    except FileNotFoundError:
        problems.append("there is no directory for temporary files")
        return
    if (problem := make_private(folder)) is None:
        tell_once(_log, f"compiled code is kept in {folder}: {problems[0]}")
        yield folder.resolve()
    else:
        problems.append(problem)


@dataclass(frozen=True)
class _Unusable:
    """A file that is not loaded, and why; no reason if it does not exist."""

    path: Path
    reason: str = ""


def _load(folder: Path, code: Code, load: Callable[[Path], Loaded]) -> "Loaded | _Unusable":
    """Load the code in a folder, if it is there and as it was made."""
    path = record = _record(folder, code)
    try:
        path = _recorded_file(record, code)
        if hashlib.sha256(read_private(path)).hexdigest() != path.stem.rpartition("-")[2]:
            return _Unusable(path, "it has changed since it was compiled")
        return load(path)
    except (OSError, AttributeError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and path == record:
            return _Unusable(record)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            reason = "it is a link"
        return _Unusable(path, reason.partition("\n")[0])


def _record(folder: Path, code: Code) -> Path:
    """Where the record of the code in a folder is: its origin, and the name of its file."""
    origin = json.dumps(dict(code.origin), sort_keys=True)
    return folder / f"{code.name}-{hashlib.sha256(origin.encode()).hexdigest()[:24]}.json"


def _recorded_file(record: Path, code: Code) -> Path:
    """The file that a record names; the name ends with the file's SHA-256."""
    try:
        fields = json.loads(read_private(record))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is damaged") from None
    if not isinstance(fields, dict) or fields.get("origin") != dict(code.origin):
        raise ValueError("it is the record of other code")
    file = fields.get("file")
    if not isinstance(file, str) or not file.startswith(f"{record.stem}-") or "/" in file:
        raise ValueError("it names no file")
    return record.with_name(file)


def _make(folder: Path, code: Code) -> Path:
    """Make code in a new folder, sync it to disk, and only then give it and its record names."""
    record = _record(folder, code)
    for left in folder.glob(f".{code.name}-*"):  # by a process that was killed
        _remove(left)
    with tempfile.TemporaryDirectory(prefix=f".{code.name}-", dir=folder) as new_folder:
        new, new_record = Path(new_folder, "new.so"), Path(new_folder, "record")
        code.make(new)
        new.chmod(0o600)
        digest = hashlib.sha256(new.read_bytes()).hexdigest()
        path = folder / f"{record.stem}-{digest}.so"
        new_record.touch(0o600)
        new_record.write_text(json.dumps({"file": path.name, "origin": dict(code.origin)}))
        for written in (new, new_record):
            sync(written)
        for old in folder.glob(f"{record.stem}*"):
            _remove(old)
        new.replace(path)
        new_record.replace(record)
        sync(folder)
    return path


def _remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process or thread is in such a block. On Windows nothing is locked."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o600), "r+b") as file:
        if sys.platform != "win32":
            import fcntl

            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _user() -> str:
    return str(os.geteuid()) if sys.platform != "win32" else "code"
