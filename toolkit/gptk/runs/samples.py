"""RUN/samples.txt: the sampled texts of a training run, to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptk.hooks.training import TrainingListener
from gptk.runs.metrics import METRICS, iterate_metrics
from gptk.system.files import write_text


class SamplesFile(TrainingListener):
    """Appends each sample to the file, which begins with the samples in metrics.jsonl."""

    def __init__(self, run: Path) -> None:
        self._path = run / "samples.txt"
        records = iterate_metrics(run / METRICS)
        write_text(self._path, "".join(_text(r) for r in records if r["kind"] == "sample"))

    def record(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "sample":
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_text(record))


def _text(record: Mapping[str, Any]) -> str:
    return f"--- step {record['step']}\n{record['prompt']}{record['text']}\n\n"
