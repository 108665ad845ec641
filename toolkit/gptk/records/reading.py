"""Reading records: a file of them, with every field checked."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from gptk.errors import DataError
from gptk.records.writing import VERSION
from gptk.system.metadata import Fields, parse_json, read_text

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
    compile: bool


class Chat(Part):
    """What made a prompt of a message."""

    system: str | None
    template: str | None


class Batch(Part):
    """The place of a prompt in its call."""

    index: _Count
    size: _Count
    equal_before: _Count
    """How many equal prompts came before it."""


class Result(Fields):
    """What is compared of a result; other fields, such as the likeliest tokens, are not."""

    text: str
    tokens: list[int]
    token_logprobs: list[float | None]
    token_texts: list[str]
    finish_reason: str
    prompt_tokens: list[int]
    alternatives: list["Result"] = Field(default_factory=list)


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


class Compared(Fields):
    """What is compared of a sampler's results."""

    sampler: str
    spec: str
    generations: list[list[Result]]


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
    """A line of `gptk generate --json`."""

    record: Literal["generation"]
    prompt: str
    chat: Chat | None
    batch: Batch
    settings: Settings


class ComparisonRecord(Record):
    """The object of `gptk compare --json`."""

    record: Literal["comparison"]
    prompts: list[str]
    settings: ComparisonSettings
    samplers: list[Compared]


def read_records(path: Path) -> list[GenerationRecord | ComparisonRecord]:
    """The records in a file: an object on each line, or a single one. Raises DataError."""
    text = read_text(path, DataError, max_bytes=_MAX_BYTES)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} has no record")
    if lines[0][1].strip() == "{":  # one object that somebody has laid out
        return [_record(parse_json(text, str(path), DataError), str(path))]
    records = []
    for number, line in lines:
        where = f"{path}, line {number}"
        records.append(_record(parse_json(line, where, DataError), where))
    return records


def _record(raw: dict[str, Any], where: str) -> GenerationRecord | ComparisonRecord:
    kind = raw.get("record")
    if kind not in ("generation", "comparison"):
        raise DataError(f"{where} is no record of gptk generate --json or gptk compare --json")
    if raw.get("version") != VERSION:
        raise DataError(f"{where} has another version than {VERSION}, the one that gptk reads")
    if kind == "generation":
        return GenerationRecord.parse(raw, where, DataError)
    return ComparisonRecord.parse(raw, where, DataError)
