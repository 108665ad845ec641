"""Training data: texts as files of tokens, and windows on them.

A text is tokenized once, into the folder `tokens` of the user's cache (or of $GPTK_CACHE):

    NAME-KEY.json            the header: tokenizer, counts, and the size, time of change and
                             SHA-256 of each source
    NAME-KEY-SUM.tokens      the token ids, little-endian integers of 2 or 4 bytes, nothing else

KEY stands for the tokenizer and the sources' names, SUM is the start of the tokens' SHA-256. Both
files are written under another name, synced and renamed, the header last: a preparation that is
cut off leaves nothing that is taken for whole, and several at once all end with good files.
"""

import codecs
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import platformdirs
import pydantic
import torch
from torch import Tensor

from gptk.errors import DataError, OptionError, suggest
from gptk.tokenizer import Tokenizer
from gptk.tokenizing import CHUNK, encode_documents

TEXT_SUFFIXES = (".markdown", ".md", ".rst", ".text", ".txt")
"""What counts as text in a folder, in small or capital letters."""


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A text's tokens, memory-mapped."""

    path: Path
    tokens: np.ndarray
    """(n_tokens,), uint16 where the vocabulary fits, else uint32."""
    n_bytes: int
    """The text's size in UTF-8."""
    documents: int
    """Files with text in them."""
    tokenizer: str
    """The name of its encoding."""
    fingerprint: str
    """A hash of everything that decides how the tokenizer encodes."""
    sha256: str
    """Of the tokens as they are in the file."""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def split(self, ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """The first int(ratio * n_tokens) tokens, to train on, and the rest, to validate on.

        Raises OptionError if ratio is not between 0 and 1.
        """
        if not 0 < ratio < 1:
            raise OptionError(f"train_ratio is {ratio}; it must be between 0 and 1")
        at = int(ratio * len(self.tokens))
        return self.tokens[:at], self.tokens[at:]


def prepare_tokens(
    sources: Sequence[str], tokenizer: Tokenizer, *, cache: Path | None = None
) -> TokenFile:
    """Tokenize texts into a file in `cache`, or find it there.

    sources: text files (UTF-8), folders, or `builtin:python-docs`, the language reference that
    comes with Python. Of a folder, all files below it that end in one of TEXT_SUFFIXES are taken,
    in the order of their paths; names that begin with a dot are not. Each file is a document. A
    document is encoded as `tokenizer.encode` does it (which puts BOS in front where the tokenizer
    has add_bos); the tokenizer's end-of-text token, eos[0], stands between two documents, and not
    after the last. A byte order mark is left out; line ends stay as they are.

    cache: without, `tokens` in $GPTK_CACHE or in the user's cache folder. A file there serves as
    long as the sources' sizes and times of change are the same, or their contents.

    Texts may be larger than memory. Raises DataError if a source is missing, cannot be read, is
    no UTF-8 text, or if there is no text at all; or if the cache cannot be written.
    """
    names = [os.fspath(one) for one in ([sources] if isinstance(sources, str) else sources)]
    found = find_sources(names)
    folder = _default_cache() if cache is None else Path(cache)
    fingerprint = tokenizer_fingerprint(tokenizer)
    key = _digest(json.dumps([fingerprint, [one.name for one in found]]))[:16]
    stem = re.sub(r"[^\w.-]+", "-", Path(names[0].removeprefix("builtin:")).stem)[:40] or "text"
    base = folder / f"{stem}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _reuse(base, found) or _write(base, found, tokenizer, fingerprint)
    except OSError as error:
        raise DataError(
            f"the tokens cannot be kept in {folder}: {error.strerror or error}; "
            "GPTK_CACHE names another folder"
        ) from None


class Windows:
    """Windows of `context_length` tokens, one each `stride` tokens; what follows is the target.

    tokens: (n,), integers, perhaps memory-mapped. stride: by default context_length, so that
    windows do not overlap. There are as many as the book's loader has: a window needs the token
    after its last, too, and what is left over at the end belongs to none.

    Raises OptionError if context_length or stride is under 1.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, stride: int | None = None) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.stride = context_length if stride is None else stride
        for name in ("context_length", "stride"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def __len__(self) -> int:
        return len(range(0, len(self.tokens) - self.context_length, self.stride))

    def start(self, index: int) -> int:
        """The token where a window begins."""
        return index * self.stride

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, each (len(indices), context_length).

        Raises IndexError for a window that is not there.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"there are {len(self)} windows, counted from 0")
        places = indices[:, None] * self.stride + np.arange(self.context_length + 1)
        tokens = torch.from_numpy(self.tokens[places].astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of n windows in one epoch, int64: 0 to n - 1 or, with shuffle, a permutation.

    The permutation sorts n raw 64-bit numbers of the Philox generator with the 128-bit key
    seed + 2**64 * epoch (both modulo 2**64), so it depends on nothing else, and is the same on
    every machine: numpy keeps the raw streams of its bit generators.
    """
    if not shuffle:
        return np.arange(n)
    key = seed % 2**64 + 2**64 * (epoch % 2**64)
    return np.random.Philox(key=key).random_raw(n).argsort(kind="stable")


def check_enough(
    windows: Windows, batch: int, *, which: str, context_length: int, train_ratio: float | None
) -> None:
    """Raise DataError unless there are `batch` windows; the message says what to change.

    which: training or validation. train_ratio: None where the two are different texts.
    """
    if len(windows) >= batch:
        return
    if batch > 1:
        needed = f"a step takes {batch}: batch_size, times accumulate and processes"
        lower = "lower batch_size, accumulate, context_length or stride"
    else:
        needed = f"the least is one, which is {context_length + 1} tokens"
        lower = "lower context_length"
    share = "" if train_ratio is None else f" (train_ratio={train_ratio:g})"
    if train_ratio is not None:
        lower += f", or {'raise' if which == 'training' else 'lower'} train_ratio"
    raise DataError(
        f"the {which} data has {len(windows.tokens)} tokens{share}, that is {len(windows)} windows "
        f"of context_length={context_length} with stride={windows.stride}; {needed}. "
        f"Give more text, {lower}"
    )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides how a tokenizer encodes a text, and of how documents are set."""
    encoding = tokenizer.encoding
    parts = [
        encoding._pat_str,
        sorted(encoding._special_tokens.items()),
        tokenizer.normalization,
        tokenizer.bos if tokenizer.add_bos else None,
        tokenizer.eos[:1],
        str(_dtype(tokenizer)),
    ]
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    return _digest(json.dumps([parts, ranks]))


# --- Sources

_BUILTIN = "builtin:"


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
                while block := file.read(CHUNK):
                    yield block
            yield b""
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror or error}") from None


def _find(source: str) -> list[Source]:
    """The files that a source stands for."""
    if source.startswith(_BUILTIN):
        name = source.removeprefix(_BUILTIN)
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


# --- Files of tokens


class _SourceHeader(pydantic.BaseModel):
    name: str
    size: int
    mtime_ns: int
    sha256: str


class _Header(pydantic.BaseModel):
    format: Literal[1] = 1
    tokens: str
    """The file of tokens, beside the header."""
    dtype: Literal["<u2", "<u4"]
    n_tokens: int
    n_bytes: int
    documents: int
    tokenizer: str
    fingerprint: str
    sha256: str
    sources: list[_SourceHeader]


def _reuse(base: Path, sources: Sequence[Source]) -> TokenFile | None:
    """The token file that is there, if it is whole and the sources are still the same."""
    header = _read_header(base)
    if header is None or [one.name for one in header.sources] != [one.name for one in sources]:
        return None
    if [one.size for one in header.sources] != [one.size for one in sources]:
        return None
    touched = False
    for before, now in zip(header.sources, sources, strict=True):
        if before.mtime_ns != now.mtime_ns or now.name.startswith(_BUILTIN):
            if before.sha256 != now.checksum():
                return None
            touched = touched or before.mtime_ns != now.mtime_ns
            before.mtime_ns = now.mtime_ns
    tokens = _open(base, header)
    if tokens is not None and touched:
        _write_header(base, header)
    return tokens


def _write(
    base: Path, sources: Sequence[Source], tokenizer: Tokenizer, fingerprint: str
) -> TokenFile:
    _remove_leftovers(base.parent)
    dtype = _dtype(tokenizer)
    digest = hashlib.sha256()
    n_tokens = documents = 0
    separator = np.array(tokenizer.eos[:1], dtype=dtype)
    with _temporary(base) as (file, new):
        texts = (source.texts() for source in sources)
        for first, ids in encode_documents(texts, tokenizer, chunk=CHUNK):
            parts = [separator] if first and documents else []
            documents += first
            for part in (*parts, ids.astype(dtype)):
                data = part.tobytes()
                digest.update(data)
                file.write(data)
                n_tokens += len(part)
        if not n_tokens:
            names = ", ".join(one.name for one in sources[:3])
            raise DataError(f"there is no text in {names}{', …' if len(sources) > 3 else ''}")
        header = _Header(
            tokens=f"{base.name}-{digest.hexdigest()[:16]}.tokens",
            dtype="<u2" if dtype.itemsize == 2 else "<u4",
            n_tokens=n_tokens,
            n_bytes=sum(one.n_bytes for one in sources),
            documents=documents,
            tokenizer=tokenizer.encoding.name,
            fingerprint=fingerprint,
            sha256=digest.hexdigest(),
            sources=[
                _SourceHeader(
                    name=one.name, size=one.size, mtime_ns=one.mtime_ns, sha256=one.sha256
                )
                for one in sources
            ],
        )
        _finish(file, new, base.parent / header.tokens)
    # Mapped before the header shows it to others, who may replace it.
    if (tokens := _open(base, header)) is None:
        raise DataError(f"another process changed {base.parent}; run this again")
    before = _read_header(base)
    _write_header(base, header)
    if before is not None and before.tokens != header.tokens:
        with contextlib.suppress(OSError):  # gone already, or in use on Windows
            (base.parent / Path(before.tokens).name).unlink()
    return tokens


def _open(base: Path, header: _Header) -> TokenFile | None:
    """The file of tokens that a header describes, or None if it is not there whole."""
    path = base.parent / Path(header.tokens).name
    dtype = np.dtype(header.dtype)
    try:
        if path.stat().st_size != header.n_tokens * dtype.itemsize:
            return None
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError):
        return None
    return TokenFile(
        path,
        tokens,
        n_bytes=header.n_bytes,
        documents=header.documents,
        tokenizer=header.tokenizer,
        fingerprint=header.fingerprint,
        sha256=header.sha256,
    )


def _read_header(base: Path) -> _Header | None:
    try:
        return _Header.model_validate_json(_header_path(base).read_bytes())
    except (FileNotFoundError, pydantic.ValidationError):
        return None


def _write_header(base: Path, header: _Header) -> None:
    with _temporary(base) as (file, new):
        file.write(header.model_dump_json(indent=1).encode())
        _finish(file, new, _header_path(base))


def _header_path(base: Path) -> Path:
    return base.with_name(f"{base.name}.json")


@contextlib.contextmanager
def _temporary(base: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside `base`, which is gone afterwards unless it was renamed."""
    new = base.with_name(f".{base.name}-{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}")
    try:
        with new.open("xb") as file:
            yield file, new
    finally:
        new.unlink(missing_ok=True)


_UNFINISHED = ".new"


def _finish(file: IO[bytes], new: Path, target: Path) -> None:
    """Have the disk hold all of a temporary file, and give it its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    new.replace(target)


def _remove_leftovers(folder: Path) -> None:
    """Remove what preparations that were killed have left, a day after."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):  # another process removed it
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


def _dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if tokenizer.encoding.max_token_value < 2**16 else "<u4")


def _default_cache() -> Path:
    return cache_folder() / "tokens"


def cache_folder() -> Path:
    """Where gptk keeps what it can make anew: $GPTK_CACHE, else the user's cache directory."""
    folder = os.environ.get("GPTK_CACHE") or platformdirs.user_cache_dir("gptk", appauthor=False)
    return Path(folder)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
