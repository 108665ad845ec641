"""The directory of a run, which one trainer at a time may write into, and its records."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import IO

from gptk.errors import TrainingError
from gptk.hooks.training import TrainingListener
from gptk.runs import checkpoints
from gptk.runs.metrics import METRICS, MetricsFile, truncate_metrics
from gptk.runs.samples import SamplesFile
from gptk.system.files import lock, remove_leftovers

CONFIG = "config.toml"
"""The settings of the run."""
LOCK = ".lock"


class RunDirectory:
    """A trainer's claim to the directory of its run.

    From `start` or `resume` to `release`, or to the end of the process, no other trainer can claim
    the directory, in whatever thread, process or program. A trainer that goes on after `release`
    claims it again with `reclaim`, which fails if another trainer has saved checkpoints meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None
        self._seen = checkpoints.Fingerprint()
        """The run's checkpoints as this trainer left them."""

    def check_new(self) -> None:
        """Raise TrainingError unless a new run may begin here; the directory need not exist."""
        try:
            str(self.path).encode()
        except UnicodeEncodeError:  # safetensors could not open its checkpoints
            raise TrainingError(f"the directory's name {self.path} is not UTF-8") from None
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"{self.path} is a file; a run needs a directory")
        if checkpoints.fingerprint(self.path):
            raise TrainingError(
                f"{self.path} holds a run already; go on with it (--resume {self.path}) or name "
                "another"
            )
        # A run that was killed before its first checkpoint has a lock, and may begin anew.
        if (self.path / CONFIG).exists() and not (self.path / LOCK).exists():
            raise TrainingError(f"{self.path} has a {CONFIG} of its own; name another directory")

    def resume(self, warn: Callable[[str], None]) -> Path:
        """Claim the directory of a run; returns its last intact checkpoint.

        warn: gets a line for each damaged checkpoint. Raises TrainingError.
        """
        self._acquire()
        try:
            checkpoints.clean(self.path)
            self._seen = checkpoints.fingerprint(self.path)
            return checkpoints.newest_intact(self.path, warn)
        except OSError as error:
            self.release()
            raise _not_written(self.path, error) from None
        except TrainingError:
            self.release()
            raise

    def claim(self) -> None:
        """Claim the directory unless this trainer has it already; made if it is missing.

        Raises TrainingError if another trainer has it, if another trainer has saved or removed
        checkpoints since this one last had it, or if it cannot be written.
        """
        if self._lock is not None:
            return
        if not self._seen:
            self.check_new()
        self._acquire()
        if checkpoints.fingerprint(self.path) != self._seen:
            self.release()
            raise TrainingError(
                f"another trainer has changed {self.path} since; go on from its last checkpoint "
                f"with --resume {self.path}"
            )

    def saved(self) -> None:
        """Remember the checkpoints as they are now, after this trainer has saved one."""
        self._seen = checkpoints.fingerprint(self.path)

    def take_over(self, other: "RunDirectory") -> None:
        """Have another claim to the same directory, which then has none."""
        self._lock, other._lock = other._lock, None
        self._seen = other._seen

    def release(self) -> None:
        """Let other trainers claim the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / LOCK)
            if self._lock is None:
                gc.collect()  # a trainer in a cycle of references may be nobody's any more
                self._lock = lock(self.path / LOCK)
            remove_leftovers(self.path)
        except OSError as error:
            raise _not_written(self.path, error) from None
        if self._lock is None:
            raise TrainingError(
                f"{self.path} is in use by another trainer, in this process or another; wait until "
                "it has finished, or end it (in Python with Trainer.close())"
            )


def open_records(run: Path, step: int) -> list[TrainingListener]:
    """The files that record a run from a step on: metrics.jsonl and samples.txt.

    Records after `step` are removed, as a run that goes on from there records them again. Raises
    SourceError for a damaged metrics.jsonl, TrainingError for what cannot be written.
    """
    try:
        truncate_metrics(run / METRICS, step or -1)  # a run at step 0 also evaluates step 0 again
        return [MetricsFile(run / METRICS), SamplesFile(run)]
    except OSError as error:
        raise _not_written(Path(error.filename or run), error) from None


def _not_written(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"{path} cannot be written: {error.strerror or error}")
