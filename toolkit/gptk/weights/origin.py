"""Where a model was loaded from, and the hashes of its files, for records of results."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptk.hooks.weights import Checkpoint

_SUFFIXES = {
    *(".safetensors", ".gguf", ".json", ".jinja", ".tiktoken", ".model", ".txt", ".bpe", ".index"),
    ".data-00000-of-00001",
}
"""Of the files in a model's folder: weights, configuration and tokenizer."""


@dataclass(frozen=True)
class Origin:
    """A model's source, its files, and how it was asked for."""

    source: str
    """As it was given, or the default."""
    path: Path | None
    """The file or folder that was read; None if that is not known."""
    quantize: str | None
    """As it was given."""
    _stamps: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)
    """The size and time of each file when it was read."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, source: str, quantize: str | None) -> "Origin":
        """The origin of a checkpoint that was just read."""
        path = Path(checkpoint.path or checkpoint.source)
        known = path if checkpoint.source and os.path.exists(path) else None
        files = [] if known is None else _files(known)
        return cls(source, known, quantize, {file: _stamp(file) for file in files})

    def files(self) -> list[dict[str, Any]]:
        """Name, size in bytes and SHA-256 of each file, which are read for it: 0.1 s for 100 MB.

        The hash is None for a file that has changed or gone since the model was loaded.
        """
        return [
            {"name": path.name, "bytes": stamp[0], "sha256": _sha256(path, stamp)}
            for path, stamp in self._stamps.items()
        ]


def _files(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and _is_of_model(file))


def _is_of_model(file: Path) -> bool:
    return any(file.name.endswith(suffix) for suffix in _SUFFIXES)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _sha256(path: Path, stamp: tuple[int, int]) -> str | None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest if _stamp(path) == stamp else None
    except OSError:
        return None
