"""Texts as files of tokens, to train on or to evaluate on.

A text is tokenized once, into the folder `tokens` of the user's cache (or of $GPTK_CACHE):

    NAME-KEY.json            the header: tokenizer, counts, and the size, times and SHA-256 of each
                             source
    NAME-KEY-SUM.tokens      the token ids, little-endian integers of 2 or 4 bytes, nothing else

KEY is a hash of the tokenizer and the sources' names, SUM the start of the tokens' SHA-256. Both
files are written under another name, synced and renamed, the header last. So an interrupted
preparation leaves no incomplete file under these names, and several processes may prepare the same
text at once. Files that are found are not believed unread: their hashes are compared, those of
tokens (about two seconds a gigabyte) and that of the header.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import pydantic

from gptk.data import encoding
from gptk.data.encoding import encode_documents
from gptk.data.sources import BUILTIN, Source, find_sources
from gptk.errors import DataError, OptionError, SourceError
from gptk.system.caches import cache_folder
from gptk.system.files import new_file, remove_leftovers, replacing
from gptk.system.metadata import open_regular, read_text
from gptk.text.fingerprint import fingerprint as text_fingerprint
from gptk.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


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
    """The name of the tokenizer's encoding."""
    fingerprint: str
    """The tokenizer's, see gptk.text.fingerprint."""
    sha256: str
    """Of the file's content."""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def split(self, ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """The first int(ratio * n_tokens) tokens, to train on, and the rest, to validate on.

        Raises OptionError if ratio is not between 0 and 1.
        """
        if not 0 < ratio < 1:
            raise OptionError(f"train_ratio is {ratio}; it must be between 0 and 1")
        count = int(ratio * len(self.tokens))
        return self.tokens[:count], self.tokens[count:]


def prepare_tokens(
    sources: Sequence[str], tokenizer: Tokenizer, *, cache: Path | None = None
) -> TokenFile:
    """Tokenize texts into a file in `cache`, or find it there.

    sources: text files (UTF-8), folders, or `builtin:python-docs`, the language reference that
    comes with Python. A folder stands for all files below it with one of TEXT_SUFFIXES, in the
    order of their paths, without names that begin with a dot. Each file is a document. Documents
    are encoded by `tokenizer.encode` (which puts BOS in front if the tokenizer has add_bos), and
    separated by the tokenizer's end-of-text token, eos[0]. A byte order mark is left out; line ends
    stay as they are.

    cache: by default `tokens` in $GPTK_CACHE or in the user's cache folder. A file in the cache is
    used as long as it is what was written, and the sources' sizes and times of change, or their
    contents, are the same.

    Texts may be larger than memory. Raises DataError if a source is missing, cannot be read or is
    not UTF-8 text, if there is no text at all, or if the cache cannot be written.
    """
    names = [os.fspath(name) for name in ([sources] if isinstance(sources, str) else sources)]
    found = find_sources(names)
    folder = _default_cache() if cache is None else Path(cache)
    fingerprint = text_fingerprint(tokenizer)
    key = _digest(json.dumps([fingerprint, [source.name for source in found]]))[:16]
    stem = re.sub(r"[^\w.-]+", "-", Path(names[0].removeprefix(BUILTIN)).stem)[:40] or "text"
    base = folder / f"{stem}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reused = _reuse(base, found, fingerprint)
        _log.info("tokens of %s %s in %s", ", ".join(names), "kept" if reused else "new", folder)
        return reused or _write(base, found, tokenizer, fingerprint)
    except OSError as error:
        raise DataError(
            f"the tokens cannot be kept in {folder}: {error.strerror or error}; "
            "set GPTK_CACHE to another folder"
        ) from None


# --- Files of tokens


class _SourceHeader(pydantic.BaseModel):
    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


class _Header(pydantic.BaseModel):
    format: Literal[2] = 2
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
    checksum: str = ""
    """Of the other fields; see `sum`."""

    def sum(self) -> str:
        return _digest(self.model_dump_json(exclude={"checksum"}))


def _reuse(base: Path, sources: Sequence[Source], fingerprint: str) -> TokenFile | None:
    """The token file in the cache, if it is intact and the sources are still the same."""
    header = _read_header(base)
    if header is None or header.fingerprint != fingerprint:
        return None
    if [s.name for s in header.sources] != [s.name for s in sources]:
        return None
    if [s.size for s in header.sources] != [s.size for s in sources]:
        return None
    touched = False
    for before, now in zip(header.sources, sources, strict=True):
        changed = (before.mtime_ns, before.ctime_ns) != (now.mtime_ns, now.ctime_ns)
        if changed or now.name.startswith(BUILTIN):
            if before.sha256 != now.checksum():
                return None
            touched = touched or changed
            before.mtime_ns, before.ctime_ns = now.mtime_ns, now.ctime_ns
    tokens = _open(base, header, compare=True)
    if tokens is not None and touched:
        _write_header(base, header)
    return tokens


def _write(
    base: Path, sources: Sequence[Source], tokenizer: Tokenizer, fingerprint: str
) -> TokenFile:
    """Tokenize the sources into a file of tokens and a header."""
    remove_leftovers(base.parent)
    with new_file(base.parent, base.name) as new:
        header = _write_tokens(new.content, base.name, sources, tokenizer, fingerprint)
        new.publish(base.parent / header.tokens)
    # Mapped before the header makes it known to other processes, which may replace it.
    if (tokens := _open(base, header, compare=False)) is None:
        raise DataError(f"another process changed {base.parent}; run this again")
    before = _read_header(base)
    _write_header(base, header)
    if before is not None and before.tokens != header.tokens:
        with contextlib.suppress(OSError):  # removed already, or in use on Windows
            (base.parent / Path(before.tokens).name).unlink()
    return tokens


def _write_tokens(
    file: IO[bytes], name: str, sources: Sequence[Source], tokenizer: Tokenizer, fingerprint: str
) -> _Header:
    """Write the token ids of all sources; name: the start of the files' names."""
    dtype = _dtype(tokenizer)
    digest = hashlib.sha256()
    n_tokens = documents = 0
    separator = np.array(tokenizer.eos[:1], dtype=dtype)
    texts = (source.texts() for source in sources)
    for first, ids in encode_documents(texts, tokenizer, chunk=encoding.CHUNK):
        parts = [separator] if first and documents else []
        documents += first
        for part in (*parts, ids.astype(dtype)):
            data = part.tobytes()
            digest.update(data)
            file.write(data)
            n_tokens += len(part)
    if not n_tokens:
        names = ", ".join(source.name for source in sources[:3])
        raise DataError(f"there is no text in {names}{', …' if len(sources) > 3 else ''}")
    return _Header(
        tokens=f"{name}-{digest.hexdigest()[:16]}.tokens",
        dtype="<u2" if dtype.itemsize == 2 else "<u4",
        n_tokens=n_tokens,
        n_bytes=sum(source.n_bytes for source in sources),
        documents=documents,
        tokenizer=tokenizer.encoding.name,
        fingerprint=fingerprint,
        sha256=digest.hexdigest(),
        sources=[
            _SourceHeader(
                name=s.name,
                size=s.size,
                mtime_ns=s.mtime_ns,
                ctime_ns=s.ctime_ns,
                sha256=s.sha256,
            )
            for s in sources
        ],
    )


def _open(base: Path, header: _Header, *, compare: bool) -> TokenFile | None:
    """The file of tokens that a header describes, or None if it is missing or incomplete.

    compare: also read the whole file, and return None if it is not what was written.
    """
    path = base.parent / Path(header.tokens).name
    dtype = np.dtype(header.dtype)
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size != header.n_tokens * dtype.itemsize:
                return None
            if compare and hashlib.file_digest(file, "sha256").hexdigest() != header.sha256:
                return None
            tokens = np.memmap(file, dtype=dtype, mode="r")
    except (OSError, SourceError, ValueError):
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
    """The header, or None if it is missing or not what was written."""
    try:
        text = read_text(_header_path(base), max_bytes=1 << 30)  # of folders with many files
        header = _Header.model_validate_json(text)
    except (SourceError, pydantic.ValidationError):
        return None
    return header if header.checksum == header.sum() else None


def _write_header(base: Path, header: _Header) -> None:
    header.checksum = header.sum()
    with replacing(_header_path(base)) as file:
        file.write(header.model_dump_json(indent=1).encode())


def _header_path(base: Path) -> Path:
    return base.with_name(f"{base.name}.json")


def _dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if tokenizer.encoding.max_token_value < 2**16 else "<u4")


def _default_cache() -> Path:
    return cache_folder() / "tokens"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
