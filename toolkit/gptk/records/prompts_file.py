"""A file of prompts, one on each line: as text, or as JSON lines.

A line in JSON is an object with a `prompt` (a text or token ids) or the `messages` of a
conversation, and may have an `id`, `settings` that differ from those of the call, and an `ordinal`.
The file is read as its prompts are needed: millions take no more memory than one.
"""

import hashlib
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Self

from gptk.decoding.prompts import Prompt
from gptk.decoding.requests import Request
from gptk.errors import DataError, GptkError, PromptError, shown, suggest
from gptk.system.metadata import parse_json
from gptk.text.chat import Message

_MAX_LINE = 1 << 26
"""The most bytes of a line."""
_BOM = b"\xef\xbb\xbf"
"""A byte order mark, with which a file may begin."""
_JSON_NAMES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt as it was given: on the command line, or on a line of a file."""

    where: str = ""
    """The file and the number of the line, for messages."""
    index: int = 0
    """Its place among the prompts of the file, from 0."""
    prompt: Prompt | None = None
    """A text or token ids; None if there are messages instead."""
    messages: Sequence[Message] | None = None
    id: str | int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its own."""
    ordinal: int | None = None
    error: GptkError | None = None
    """Why the line cannot be read; then it has no prompt."""
    comparison: Mapping[str, Any] | None = None
    """The comparison that it is decoded for, as its record has it."""

    def request(self) -> Request:
        """What is asked of a model that takes the prompt as it is."""
        ordinal = self.index if self.ordinal is None else self.ordinal
        prompt = "" if self.prompt is None else self.prompt
        return Request(prompt, self.messages, settings=self.settings, ordinal=ordinal)


class PromptsFile:
    """The prompts of a file; `-` is standard input.

    Of a regular file the number of prompts is counted, and its SHA-256 computed, at the start. It
    can be read several times, other files only once.

    Raises DataError if the file cannot be opened, has no prompts, or changes while it is read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self._file: IO[bytes] = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115
            self._status = os.fstat(self._file.fileno())
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
        self.is_regular = stat.S_ISREG(self._status.st_mode) and name != "-"
        self.count: int | None = None
        """The number of prompts; None if the file is not regular."""
        self.sha256 = ""
        """Of the bytes of a regular file."""
        try:
            if self.is_regular:
                self._measure()
            self._ahead = list(itertools.islice(self._raw_lines(), 1))
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
        if not self._ahead:
            raise DataError(f"{name} has no prompts; write one on each line")
        self._has_json = name.endswith(_JSON_NAMES) or _is_object(self._ahead[0][1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.name != "-":
            self._file.close()

    def about(self) -> dict[str, str]:
        """What the file is, as records have it."""
        return {"name": os.path.basename(self.name), "sha256": self.sha256}

    def first(self, most: int) -> Iterator[GivenPrompt]:
        """The first prompts, of which there may be fewer; of a file that is not regular, one."""
        yield from itertools.islice(self._prompts(self._lines()), most if self.is_regular else 1)

    def prompts(self) -> Iterator[GivenPrompt]:
        """All prompts, one after another; a line that cannot be read has an error."""
        yield from self._prompts(self._lines())
        if self.is_regular and _stamp(os.fstat(self._file.fileno())) != _stamp(self._status):
            raise DataError(f"{self.name} has changed while it was read")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not empty, with their numbers."""
        if self.is_regular:
            self._file.seek(0)
            return self._raw_lines()
        return itertools.chain(self._ahead, self._raw_lines(self._ahead[0][0]))

    def _raw_lines(self, number: int = 0) -> Iterator[tuple[int, bytes]]:
        while line := self._file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = self._file.readline(_MAX_LINE)
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, line.removesuffix(b"\n").removesuffix(b"\r")

    def _prompts(self, lines: Iterator[tuple[int, bytes]]) -> Iterator[GivenPrompt]:
        for index, (number, line) in enumerate(lines):
            try:
                fields = self._fields(line)
            except PromptError as error:
                fields = {"error": error}
            yield GivenPrompt(f"{self.name}, line {number}", index, **fields)

    def _fields(self, line: bytes) -> dict[str, Any]:
        """The fields of the prompt that a line describes. Raises PromptError."""
        if len(line) > _MAX_LINE:
            raise PromptError(f"the line has more than {_MAX_LINE:,} bytes")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise PromptError(f"byte {error.start + 1} is not UTF-8 text") from None
        return _read_object(text) if self._has_json else {"prompt": text}

    def _measure(self) -> None:
        """Count the prompts of a regular file, and compute its hash."""
        digest, self.count = hashlib.sha256(), 0
        line_has_text = False
        for number, piece in enumerate(iter(lambda: self._file.read(1 << 20), b"")):
            digest.update(piece)
            *whole, last = (piece if number else piece.removeprefix(_BOM)).split(b"\n")
            for line in whole:
                self.count += line_has_text or bool(line.strip())
                line_has_text = False
            line_has_text = line_has_text or bool(last.strip())
        self.count += line_has_text
        self.sha256 = digest.hexdigest()
        self._file.seek(0)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _is_object(line: bytes) -> bool:
    """Whether a line is an object in JSON, though perhaps none that gptk takes."""
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


_FIELDS = ("prompt", "messages", "id", "settings", "ordinal")


def _read_object(text: str) -> dict[str, Any]:
    """The fields of an object in JSON, checked; a field that is null is left out."""
    raw = parse_json(text, "the line", PromptError)
    values = {name: value for name, value in raw.items() if value is not None}
    for name in values:
        if name not in _FIELDS:
            raise PromptError(
                f"there is no field {shown(name)}; {suggest(name, _FIELDS, what='fields')}"
            )
    if ("prompt" in values) == ("messages" in values):
        raise PromptError("a line has either a prompt or messages")
    for name, is_right, form in _FORMS:
        if name in values and not is_right(values[name]):
            raise PromptError(f"{name} is {shown(values[name])}; it must be {form}")
    return values


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_FORMS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "prompt",
        lambda v: isinstance(v, str) or (isinstance(v, list) and all(map(_is_whole, v))),
        "a text or a list of token ids",
    ),
    (
        "messages",
        lambda v: isinstance(v, list) and all(isinstance(message, dict) for message in v),
        'a list of messages such as {"role": "user", "content": "…"}',
    ),
    ("id", lambda v: isinstance(v, str) or _is_whole(v), "a text or a whole number"),
    ("settings", lambda v: isinstance(v, dict), 'an object such as {"max_new_tokens": 8}'),
    (
        "ordinal",
        lambda v: _is_whole(v) and 0 <= v < 2**63,
        "a whole number, 0 or more",
    ),
)
