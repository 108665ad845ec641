"""RUN/metrics.jsonl: the records of a training run, a JSON object a line.

docs/training.md describes the records. NaN and infinities are null, as JSON has none.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic_core

from gptk.errors import SourceError
from gptk.hooks.training import TrainingListener
from gptk.system.files import replacing
from gptk.system.metadata import open_regular

METRICS = "metrics.jsonl"


class MetricsFile(TrainingListener):
    """Appends each record to a file at once. Raises OSError if it cannot be written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - close() is the listener's

    def record(self, record: Mapping[str, Any]) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, without a last line that is incomplete.

    Raises SourceError if the file is missing, or if another line is damaged.
    """
    return list(iterate_metrics(path))


def iterate_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """As read_metrics, one record at a time: a list of a million takes a gigabyte of memory."""
    for _, record in _lines(path):
        yield record


def truncate_metrics(path: str | os.PathLike[str], step: int) -> None:
    """Remove the records after `step`, and an incomplete last line; create a missing file.

    The other lines stay byte for byte, and the old file stays until the new one is complete.
    Raises SourceError if a line is damaged, OSError if the new file cannot be written.
    """
    target = Path(path)
    with replacing(target) as new:
        if target.exists():
            new.writelines(line for line, record in _lines(target) if record["step"] <= step)


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its record."""
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # incomplete: the process was killed while it wrote
                try:
                    yield line, _record(line)
                except ValueError as error:
                    raise SourceError(f"{path}, line {number} is damaged: {error}") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None


def _record(line: bytes) -> dict[str, Any]:
    record = pydantic_core.from_json(line)  # a quarter of the time that the json module takes
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("kind"), str)
        or type(record.get("step")) is not int  # not a bool either
    ):
        raise ValueError("it is no record with a kind and a step")
    if any(isinstance(value, int) and abs(value) >= 2**63 for value in record.values()):
        raise ValueError("a number of it is too large")
    if not all(isinstance(record.get(name, ""), str) for name in ("prompt", "text")):
        raise ValueError("its prompt or text is no text")
    return record
