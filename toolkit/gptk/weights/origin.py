"""Where a model was loaded from, and its files as they were then."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptk.hooks.weights import Checkpoint
from gptk.system.read_files import ReadFile

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
    files: Sequence[ReadFile] = ()
    folders: Sequence[ReadFile] = ()
    """From the source to the folder that was read: a training run, of which the best checkpoint
    is loaded, gets new ones."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, source: str, quantize: str | None) -> "Origin":
        """The origin of a checkpoint that was just read."""
        path = Path(checkpoint.path or checkpoint.source)
        if not checkpoint.source or not os.path.exists(path):
            return cls(source, None, quantize)
        files, folders = map(ReadFile.of, _files(path)), map(ReadFile.of, _folders(path, source))
        return cls(source, path, quantize, tuple(files), tuple(folders))

    def is_unchanged(self) -> bool:
        """Whether loading the source again would read the same files, as far as their sizes and
        times tell."""
        return all(read.is_unchanged() for read in (*self.files, *self.folders))


def _files(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and _is_of_model(file))


def _is_of_model(file: Path) -> bool:
    """Whether a file's name is that of weights, configuration or tokenizer. A checkpoint of a run
    also has training.json and training.safetensors, with which training goes on, and hashes."""
    known = any(file.name.endswith(suffix) for suffix in _SUFFIXES)
    return known and not file.name.startswith(("training.", "checksums."))


def _folders(path: Path, source: str) -> Iterator[Path]:
    if path.is_dir():
        yield path
        if path.is_relative_to(source):
            yield from path.parents[: len(path.parts) - len(Path(source).parts)]
