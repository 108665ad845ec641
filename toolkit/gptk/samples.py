"""RUN/samples.txt: the sampled texts of a training run, to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptk.metrics import read_metrics
from gptk.saving import write_text
from gptk.training import TrainingListener


class SamplesFile(TrainingListener):
    """Writes the file from the records in metrics.jsonl, at the start and after each sample."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._write()

    def record(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "sample":
            self._write()

    def _write(self) -> None:
        samples = [
            f"--- step {one['step']}\n{one['prompt']}{one['text']}\n"
            for one in read_metrics(self._run / "metrics.jsonl")
            if one["kind"] == "sample"
        ]
        write_text(self._run / "samples.txt", "\n".join(samples))
