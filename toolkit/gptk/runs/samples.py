"""RUN/samples.txt: the sampled texts of a training run, to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptk.hooks.training import TrainingListener
from gptk.runs.metrics import iterate_metrics
from gptk.system.files import write_text


class SamplesFile(TrainingListener):
    """Made anew from metrics.jsonl when a run begins or goes on; then each sample is appended."""

    def __init__(self, run: Path) -> None:
        self._path = run / "samples.txt"
        records = iterate_metrics(run / "metrics.jsonl")
        write_text(self._path, "".join(_text(one) for one in records if one["kind"] == "sample"))

    def record(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "sample":
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_text(record))


def _text(record: Mapping[str, Any]) -> str:
    return f"--- step {record['step']}\n{record['prompt']}{record['text']}\n\n"
