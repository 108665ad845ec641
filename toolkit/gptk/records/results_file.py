"""A file of results to which records are appended as they are made, and which may be gone on with.

Each record is written as a whole line at once. A process that is killed can leave a last line that
is incomplete, after a power failure for example; it is cut off when the file is gone on with. One
process at a time writes to a file.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pydantic_core

from gptk.errors import DataError, shown
from gptk.records.plugin_files import files_in, known_differences
from gptk.records.writing import VERSION
from gptk.system.files import lock

_SYNC_EVERY = 1.0
"""Seconds between two times that the file is synced to disk."""
_MOST_REMEMBERED = 1000
"""Different plug-ins of prompts for which files are remembered."""
_BEGINNING = json.dumps({"record": "generation", "version": VERSION}).encode()[:-1]
"""How each line begins."""


class ResultsFile:
    """The results in a file, and their writer. Raises DataError, OSError when it writes.

    In a `with` statement, leaving the block syncs the file to disk and closes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            locked = lock(self.path)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
        if locked is None:
            raise DataError(f"{path} is in use: another process writes results to it")
        self._file = locked
        self.done = 0
        """The prompts that have a result."""
        self.failed = 0
        """Those of them whose result is an error."""
        self.models: list[Any] = []
        """The models that the results are of, as records have them; they may differ in the place of
        their files."""
        self._has = bytearray()
        """A bit for each prompt."""
        self._files: dict[str, list[Mapping[str, Any]]] = {}
        """The files that plug-ins have read, by the plug-ins' specs."""
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def seed(self) -> int | None:
        """The seed of the call that wrote the results; None if none of them depends on it."""
        for _, record in self._records():
            settings = record.get("settings")
            if isinstance(settings, dict) and "seed" not in _own_settings(record):
                return settings["seed"] if type(settings.get("seed")) is int else None
        return None

    def read(self, count: int, difference: Callable[[Mapping[str, Any]], str | None]) -> None:
        """Note which results are there, of `count` prompts, and cut off an incomplete last line.

        difference: what is different in a record from what the present call would write, if
        anything is. Raises DataError for such a record.
        """
        self._has = bytearray((count + 7) // 8)
        whole = 0
        for end, record in self._records():
            whole, index = end, record.get("index")
            if (different := difference(record)) is not None:
                raise self._refused(different)
            if not isinstance(index, int) or not 0 <= index < count:
                raise self._refused(f"a result of a prompt {shown(index)} of {count:,}")
            if record.get("model") not in self.models:
                self.models.append(record.get("model"))
            if index not in self:
                self._note(index)
                self.failed += record.get("error") is not None
            self._check_files(record)
        try:
            if whole < self._file.seek(0, os.SEEK_END):
                self._file.truncate(whole)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def results(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The record of each prompt that has a result, in the order of the file, and what it was
        read from, for messages."""
        found: set[object] = set()
        for number, (_, record) in enumerate(self._records(), start=1):
            if record.get("index") not in found:
                found.add(record.get("index"))
                yield record, f"{self.path}, line {number}"

    def __contains__(self, index: object) -> bool:
        """Whether the prompt with this index has a result."""
        return isinstance(index, int) and bool(self._has[index // 8] >> index % 8 & 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises OSError, and DataError if a plug-in has read other files than for
        the records before."""
        self._check_files(record)
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
            if time.monotonic() - self._synced >= _SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            error.filename = str(self.path)
            raise
        self._note(record["index"])
        self.failed += record["error"] is not None

    def _check_files(self, record: Mapping[str, Any]) -> None:
        files, specs = files_in(record), _specs(record)
        if not files or (specs not in self._files and len(self._files) == _MOST_REMEMBERED):
            return
        lines = known_differences(self._files.setdefault(specs, files), files)
        if lines:
            raise self._refused(f"results with other files ({lines[0]})")

    def _note(self, index: int) -> None:
        self._has[index // 8] |= 1 << index % 8
        self.done += 1

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The records that are there, each with the place in the file at which its line ends."""
        end = 0
        try:
            self._file.seek(0, os.SEEK_END)  # so that Python forgets what it has read ahead
            self._file.seek(0)
            if not _BEGINNING.startswith(self._file.read(len(_BEGINNING))):
                raise self._refused("something else than results of gptk")
            self._file.seek(0)
            for number, line in enumerate(self._file, start=1):
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield end, self._record(line, number)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = pydantic_core.from_json(line)  # in a quarter of the json module's time
        except ValueError as error:
            raise self._refused(f"a damaged line {number} ({error})") from None
        if not isinstance(record, dict) or record.get("record") != "generation":
            raise self._refused(f"a line {number} that is no result of gptk")
        if record.get("version") != VERSION:
            raise self._refused(f"a line {number} of another version of gptk")
        if not isinstance(record.get("model"), dict):
            raise self._refused(f"a line {number} without a model")
        return record

    def _refused(self, what: str) -> DataError:
        return DataError(f"{self.path} has {what}; name another file, or remove it")


def _own_settings(record: Mapping[str, Any]) -> Mapping[str, Any]:
    own = record.get("own_settings")
    return own if isinstance(own, dict) else {}


def _specs(record: Mapping[str, Any]) -> str:
    """The specs of the plug-ins that a result depends on."""
    settings = record.get("settings")
    named = settings if isinstance(settings, dict) else {}
    return json.dumps([named.get(name) for name in ("sampler", "processors", "draft")])
