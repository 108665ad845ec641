"""The directory of a run while a process trains it: its lock and the files of its records."""

from pathlib import Path
from typing import IO

from gptk.errors import TrainingError
from gptk.hooks.training import TrainingListener
from gptk.runs.metrics import METRICS, MetricsFile, truncate_metrics
from gptk.runs.samples import SamplesFile
from gptk.system.files import lock

CONFIG = "config.toml"
"""The settings of the run."""


def lock_run(run: Path) -> IO[bytes]:
    """Keep other processes from training a run until the file returned is closed.

    Raises TrainingError if another process trains it.
    """
    file = lock(run / ".lock")
    if file is None:
        raise TrainingError(f"{run} is being trained by another process")
    return file


def open_records(run: Path, step: int) -> list[TrainingListener]:
    """The files that record a run from a step on: metrics.jsonl and samples.txt.

    Records after `step` are removed, as a run that goes on from there records them again.
    """
    truncate_metrics(run / METRICS, step or -1)  # a run at step 0 also evaluates step 0 again
    return [MetricsFile(run / METRICS), SamplesFile(run)]
