"""Files as they were when they were read: their hashes, and whether they have changed since."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class ReadFile:
    """A file, or a folder's list of names, as it was when it was read."""

    path: Path
    """Absolute."""
    stamp: _Stamp
    """Size in bytes, time of the last change in ns, device and inode."""

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """A file that is about to be read, or was just read. Raises OSError if there is none."""
        return cls(Path(os.path.abspath(path)), _stamp(path))

    def is_unchanged(self) -> bool:
        """Whether neither size, time nor identity differ now; the content is not read."""
        try:
            return _stamp(self.path) == self.stamp
        except OSError:
            return False

    def sha256(self) -> str | None:
        """The hash of its bytes, which are read for it: 0.1 s for 100 MB. None if the file has
        changed since, or cannot be read."""
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None
        return digest if self.is_unchanged() else None

    def to_dict(self) -> dict[str, Any]:
        """Name, size in bytes and SHA-256, as records have them."""
        return {"name": self.path.name, "bytes": self.stamp[0], "sha256": self.sha256()}


def _stamp(path: str | os.PathLike[str]) -> _Stamp:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino
