"""Folders and files that belong to the user and that nobody else can write, as ssh asks of keys.

Who can write a file that gptk believes, such as code, can have the user run or compute what they
like.
"""

import contextlib
import os
import stat
import sys
from pathlib import Path
from typing import IO


def make_private(folder: Path) -> str | None:
    """Make a folder if need be. Returns why it is not the user's alone, or None.

    It must belong to the user, and nobody else may be able to write it, nor to exchange it by
    writing one of its parents.
    """
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        for place in reversed(missing):
            with contextlib.suppress(FileExistsError):
                place.mkdir(mode=0o700)
        resolved = folder.resolve(strict=True)
        places = [(place, place.lstat()) for place in (resolved, *resolved.parents)]
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        return f"{folder} cannot be made: {getattr(error, 'strerror', None) or error}"
    if folder.is_symlink() or not stat.S_ISDIR(places[0][1].st_mode):
        return f"{folder} is not a folder"
    for place, status in places:
        # In a directory with the sticky bit, such as /tmp, only its owner can exchange a folder.
        sticky = place != resolved and bool(status.st_mode & stat.S_ISVTX)
        if problem := _problem(place, status, sticky=sticky):
            return problem
    return None


def _problem(place: Path, status: os.stat_result, *, sticky: bool = False) -> str | None:
    """Why others than the user can write a file or folder, or None. The superuser always can."""
    if sys.platform == "win32":  # which keeps the folders of users apart by other means
        return None
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in (0, os.geteuid()):
        return f"{place} belongs to another user"
    by_group = mode & stat.S_IWGRP and not _is_private_group(status.st_gid)
    if (mode & stat.S_IWOTH or by_group) and not sticky:
        return f"others can write to {place} (mode {mode:o})"
    return None


def _is_private_group(group: int) -> bool:
    """Whether a group is the user's own: it has their name, and no other members.

    Systems that give each user such a group let it write new files (umask 002).
    """
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:  # a user or a group without a name
        return False
    is_theirs = user.pw_gid == group and user.pw_name == found.gr_name
    return is_theirs and set(found.gr_mem) <= {user.pw_name}


def open_private(path: Path) -> IO[bytes]:
    """Open a file of the user's own that nobody else can write, for reading.

    Raises OSError, or ValueError, which says what is wrong with the file.
    """
    # Without following a link, and without waiting for the other end of a pipe.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, os.O_RDONLY | flags), "rb")  # noqa: SIM115
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        if problem := _problem(path, status):
            raise ValueError(problem)
    except BaseException:
        file.close()
        raise
    return file


def read_private(path: Path) -> bytes:
    """Read a file of the user's own that nobody else can write. Raises as `open_private`."""
    with open_private(path) as file:
        return file.read()
