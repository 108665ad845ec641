"""Reading records: a file of them, with every field checked."""

import math
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from gptk.errors import DataError
from gptk.hooks.results import Generation, RankedToken, TopTokens
from gptk.records.writing import VERSION
from gptk.system.metadata import Fields, open_regular, parse_json, read_json

_MAX_BYTES = 1 << 26
_Count = Annotated[int, Field(ge=0)]


class Part(Fields):
    """A part of a record: typed, and without fields that are not declared."""

    model_config = pydantic.ConfigDict(extra="forbid")


class Load(Part):
    """How to load the model: the arguments of `gptk.load`."""

    model: str | None
    tokenizer: str | None
    device: str
    dtype: str
    quantize: str | None


class LikelyToken(Fields):
    """A token that was among the likeliest ones at a step."""

    token: int
    logprob: float
    text: str


class LikelyTokens(Fields):
    """The likeliest tokens at a step, before and after the processors."""

    before: list[LikelyToken]
    after: list[LikelyToken]


class Result(Fields):
    """A result. Its score, the likeliest tokens and the like are not compared."""

    text: str
    tokens: list[int]
    token_logprobs: list[float | None]
    token_texts: list[str]
    finish_reason: str
    prompt_tokens: list[int]
    alternatives: list["Result"] = Field(default_factory=list)
    score: float | None = None
    seed: int = 0
    ordinal: int = 0
    complete: bool | None = None
    parsed: Any = None
    top_logprobs: list[LikelyTokens] | None = None

    def generations(self) -> list[Generation]:
        """The results of the prompt, without alternatives; what was not finite is -inf."""
        return [Generation(**result._values()) for result in (self, *self.alternatives)]

    def _values(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in Result.model_fields}
        values["token_logprobs"] = list(map(_number, self.token_logprobs))
        top = self.top_logprobs
        values["top_logprobs"] = top and [
            TopTokens(_ranked(s.before), _ranked(s.after)) for s in top
        ]
        return {**values, "score": _number(self.score), "alternatives": []}


def _ranked(tokens: Iterable[LikelyToken]) -> tuple[RankedToken, ...]:
    return tuple(RankedToken(each.token, each.logprob, each.text) for each in tokens)


def _number(value: float | None) -> float:
    return -math.inf if value is None else value


class Settings(Part):
    """The settings of `LanguageModel.generate`."""

    sampler: str
    processors: list[str]
    max_new_tokens: int
    n: int
    seed: int
    ordinal: int
    stop: list[str]
    draft: str | None
    overflow: str
    max_seconds: float | None
    ignore_eos: bool
    use_cache: bool
    top_logprobs: int
    observers: list[str]


class ComparisonSettings(Part):
    """The settings of `gptk.compare`."""

    processors: list[str]
    n: int
    max_new_tokens: int
    seed: int
    seeds: int
    metrics: list[str]


class ComparedPrompt(Part):
    """A prompt of a comparison."""

    index: _Count
    id: str | int | None
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    settings: dict[str, Any]
    ordinal: _Count


class ComparisonRun(Fields):
    """For which sampler of a comparison, and which prompt, a result was made."""

    sampler: str
    prompt: _Count
    seconds: Annotated[float, Field(ge=0)]


class Measured(Fields):
    """The results of a sampler for a prompt with a seed."""

    prompt: _Count
    seed: int
    generations: list[Result]


class Compared(Fields):
    """What is compared of a sampler's results."""

    sampler: str
    spec: str
    processors: list[str]
    measured: list[Measured]


class PluginFile(Part):
    """A file that a plug-in has read, or is written in."""

    plugin: str
    name: str
    bytes: _Count
    sha256: str | None
    """None if it had changed since it was read."""


class Record(Fields):
    """What records of all kinds have."""

    load: Load
    model: dict[str, Any]
    environment: dict[str, Any]
    plugins: dict[str, Any]
    files: list[PluginFile]


class GenerationRecord(Record, Result):
    """A result, as `gptk generate --json` and `--out` write it."""

    record: Literal["generation"]
    index: _Count
    comparison: ComparisonRun | None = None
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    template: str | None
    settings: Settings


class Failure(Fields):
    """Why decoding failed."""

    kind: str
    message: str


class ErrorRecord(Record):
    """What is there of a prompt whose decoding failed."""

    record: Literal["generation"]
    index: _Count
    comparison: ComparisonRun | None = None
    error: Failure


class ComparisonRecord(Record):
    """The object of `gptk compare --json`."""

    record: Literal["comparison"]
    prompts: list[ComparedPrompt]
    settings: ComparisonSettings
    samplers: list[Compared]


AnyRecord = GenerationRecord | ErrorRecord | ComparisonRecord


def read_records(path: Path) -> Iterator[AnyRecord]:
    """The records in a file, one after another: an object on each line, or a single one.

    Raises DataError.
    """
    number, has_records = 0, False
    with open_regular(path, DataError) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip():
                continue
            if not has_records and line.strip() == b"{":  # one object that somebody has laid out
                yield checked_record(read_json(path, DataError, max_bytes=_MAX_BYTES), str(path))
                return
            has_records = True
            yield read_record(line, f"{path}, line {number}")
    if not has_records:
        raise DataError(f"{path} has no record")


def _lines(file: BufferedReader, path: Path) -> Iterator[bytes]:
    try:
        while line := file.readline(_MAX_BYTES + 1):
            if len(line) > _MAX_BYTES:
                raise DataError(f"a line of {path} has more than {_MAX_BYTES:,} bytes")
            yield line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_record(line: bytes, where: str) -> AnyRecord:
    """The record on a line. where: the file and the line, for messages. Raises DataError."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 at byte {error.start:,}") from None
    return checked_record(parse_json(text, where, DataError), where)


def checked_record(raw: Mapping[str, Any], where: str) -> AnyRecord:
    """A record of which every field is checked. where: for messages. Raises DataError."""
    kind = raw.get("record")
    if kind not in ("generation", "comparison"):
        raise DataError(f"{where} is no record of gptk generate or gptk compare")
    if raw.get("version") != VERSION:
        raise DataError(f"{where} has another version than {VERSION}, the one that gptk reads")
    if kind == "comparison":
        return ComparisonRecord.parse(raw, where, DataError)
    if raw.get("error") is not None:
        return ErrorRecord.parse(raw, where, DataError)
    return GenerationRecord.parse(raw, where, DataError)
