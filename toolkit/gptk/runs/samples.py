"""RUN/samples.txt: the sampled texts of a training run, to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptk.hooks.training import TrainingListener
from gptk.runs.metrics import METRICS, iterate_metrics
from gptk.system.files import replacing


class SamplesFile(TrainingListener):
    """Appends each sample to the file, which begins with the samples in metrics.jsonl.

    Raises OSError if it cannot be written, SourceError if metrics.jsonl is damaged.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "samples.txt"
        with replacing(self._path) as file:
            for record in iterate_metrics(run / METRICS):
                if record["kind"] == "sample":
                    file.write(_text(record).encode())

    def record(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "sample":
            with self._path.open("ab") as file:
                file.write(_text(record).encode())


def _text(record: Mapping[str, Any]) -> str:
    return f"--- step {record['step']}\n{record.get('prompt', '')}{record.get('text', '')}\n\n"
