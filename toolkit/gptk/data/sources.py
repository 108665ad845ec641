"""Texts to train on or to evaluate on: files, folders, and those that come with Python."""

import codecs
import hashlib
import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptk.data import encoding
from gptk.errors import DataError, suggest

TEXT_SUFFIXES = (".markdown", ".md", ".rst", ".text", ".txt")
"""What counts as text in a folder, in small or capital letters."""


# --- Sources

BUILTIN = "builtin:"


def find_sources(names: Sequence[str]) -> list["Source"]:
    """The files that sources stand for, see `prepare_tokens`.

    Raises DataError for a source that is missing, and if there is none at all.
    """
    if not names:
        raise DataError("no data is given; name text files, folders, or builtin:python-docs")
    return [one for name in names for one in _find(name)]


@dataclass
class Source:
    """A file, or a text that comes with Python; what is in it is known once it is read."""

    name: str
    open: Callable[[], IO[bytes]]
    size: int
    """In bytes."""
    mtime_ns: int
    n_bytes: int = 0
    """Without a byte order mark."""
    sha256: str = ""

    def texts(self) -> Iterator[str]:
        """The text in pieces, while its sum is taken."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        digest, read, begun = hashlib.sha256(), 0, False
        for block in self._blocks():
            digest.update(block)
            held, _ = decoder.getstate()
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.name} is not UTF-8 text: byte {read - len(held) + error.start} is "
                    f"0x{error.object[error.start]:02x} ({error.reason})"
                ) from None
            read += len(block)
            if text and not begun:
                begun = True
                if text[0] == "\N{BYTE ORDER MARK}":
                    text = text[1:]
                    self.n_bytes -= len(codecs.BOM_UTF8)
            if text:
                yield text
        self.n_bytes += read
        self.sha256 = digest.hexdigest()

    def checksum(self) -> str:
        """The SHA-256 of the content."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        """The content in blocks, the last of them empty."""
        try:
            with self.open() as file:
                while block := file.read(encoding.CHUNK):
                    yield block
            yield b""
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror or error}") from None


def _find(source: str) -> list[Source]:
    """The files that a source stands for."""
    if source.startswith(BUILTIN):
        name = source.removeprefix(BUILTIN)
        if name not in _BUILTINS:
            raise DataError(
                f"no text called {source!r} comes with gptk; "
                f"{suggest(name, _BUILTINS, what='texts')}; files and folders are named by path"
            )
        content = _BUILTINS[name]().encode()
        return [Source(source, lambda: io.BytesIO(content), len(content), 0)]
    if not source:
        raise DataError("a source of data is empty; name a text file, a folder, or a builtin text")
    path = Path(os.path.expanduser(source)).absolute()
    try:
        if not path.is_dir():
            return [_file(path)]
        if files := _text_files(path):
            return [_file(one) for one in files]
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from None
    raise DataError(f"the folder {source} has no text files ({', '.join(TEXT_SUFFIXES)}) below it")


def _file(path: Path) -> Source:
    if not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "is not there"
        raise DataError(f"the data {path} {what}")
    status = path.stat()
    name = str(path).encode(errors="backslashreplace").decode()  # of any bytes
    return Source(name, lambda: path.open("rb"), status.st_size, status.st_mtime_ns)


def _text_files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if name.lower().endswith(TEXT_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.parts)


def _python_docs() -> str:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "".join(topics[key] for key in sorted(topics))


_BUILTINS = {"python-docs": _python_docs}
