"""Texts to train on or to evaluate on: files, folders, and texts that come with Python."""

import codecs
import hashlib
import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptk.errors import DataError, suggest
from gptk.system.metadata import open_regular

TEXT_SUFFIXES = (".markdown", ".md", ".rst", ".text", ".txt")
"""The suffixes of text files in a folder, in small or capital letters."""

BLOCK = 1 << 20
"""Bytes of a text that are read at a time."""

BUILTIN = "builtin:"
"""The prefix of the names of texts that come with Python."""


def find_sources(names: Sequence[str]) -> list["Source"]:
    """The named files, and the text files below the named folders; see `prepare_tokens`.

    Raises DataError for a file or folder that is missing or empty, and if nothing is named.
    """
    if not names:
        raise DataError("no data is given; name text files, folders, or builtin:python-docs")
    return [source for name in names for source in _find(name)]


@dataclass
class Source:
    """A file, or a text that comes with Python."""

    name: str
    open: Callable[[], IO[bytes]]
    size: int
    """In bytes."""
    mtime_ns: int
    ctime_ns: int
    """When the file was last changed: unlike mtime_ns, no program can set it back."""
    n_bytes: int = 0
    """The text's size without a byte order mark; known once `texts` has been read."""
    sha256: str = ""
    """Of the content; known once `texts` has been read."""

    def texts(self) -> Iterator[str]:
        """The text in pieces; sets n_bytes and sha256 at the end."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        digest, read, begun = hashlib.sha256(), 0, False
        for block in self._blocks():
            digest.update(block)
            undecoded, _ = decoder.getstate()
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.name} is not UTF-8 text: byte {read - len(undecoded) + error.start} is "
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
        """The content in blocks, then an empty block."""
        try:
            with self.open() as file:
                while block := file.read(BLOCK):
                    yield block
            yield b""
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror or error}") from None


def _find(name: str) -> list[Source]:
    """The builtin text or file of that name, or the text files below the folder."""
    if name.startswith(BUILTIN):
        return [_builtin(name)]
    if not name:
        raise DataError("a source of data is empty; name a text file, a folder, or a builtin text")
    path = Path(os.path.expanduser(name)).absolute()
    try:
        if not path.is_dir():
            return [_file(path)]
        if files := _text_files(path):
            return [_file(file) for file in files]
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
    raise DataError(f"the folder {name} has no text files ({', '.join(TEXT_SUFFIXES)}) below it")


def _builtin(name: str) -> Source:
    text = name.removeprefix(BUILTIN)
    if text not in _BUILTIN_TEXTS:
        raise DataError(
            f"no text called {name!r} comes with gptk; "
            f"{suggest(text, _BUILTIN_TEXTS, what='texts')}; files and folders are named by path"
        )
    content = _BUILTIN_TEXTS[text]().encode()
    return Source(name, lambda: io.BytesIO(content), len(content), 0, 0)


def _file(path: Path) -> Source:
    if not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "is not there"
        raise DataError(f"the data {path} {what}")
    status = path.stat()
    name = str(path).encode(errors="backslashreplace").decode()  # a path may be any bytes
    return Source(
        name,
        lambda: open_regular(path, DataError),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _text_files(folder: Path) -> list[Path]:
    """All text files below a folder, without hidden ones, in the order of their paths."""
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


_BUILTIN_TEXTS = {"python-docs": _python_docs}
