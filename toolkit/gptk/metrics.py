"""RUN/metrics.jsonl: what a training run recorded, a JSON object a line.

The records are described in docs/training.md. Numbers that are not finite stand as null, since
JSON has no way to write them.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptk.errors import SourceError
from gptk.training import TrainingListener


class MetricsFile(TrainingListener):
    """Appends each record to a file, at once. Raises OSError if it cannot be written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - close() is the listener's

    def record(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, without a last line that was cut off while it was written.

    Raises SourceError if the file is missing, or if another line is damaged.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last line end: cut off, or ""
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
                raise ValueError("it is no record with kind and step")
        except ValueError as error:
            raise SourceError(f"{path}, line {number} is damaged: {error}") from None
        records.append(record)
    return records


def truncate_metrics(path: str | os.PathLike[str], step: int) -> None:
    """Drop the records after `step`, and a last line that was cut off; makes the file if it is
    missing. What is there stays until the new file is whole."""
    target = Path(path)
    kept = [one for one in read_metrics(target) if one["step"] <= step] if target.exists() else []
    new = target.with_name(f".{target.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, kept))
        file.flush()
        os.fsync(file.fileno())
    new.replace(target)


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"
