"""Saving and resuming a run; `gptk.runs.checkpoints` says what a checkpoint holds."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from gptk.errors import SourceError, TrainingError
from gptk.model.gpt import GPT
from gptk.runs import checkpoints
from gptk.runs.checkpoints import SavedProgress
from gptk.runs.directory import CONFIG, RunDirectory
from gptk.system.files import write_text
from gptk.text.tokenizer import Tokenizer
from gptk.training.config import TrainConfig
from gptk.training.processes import Processes
from gptk.training.progress import TrainingProgress
from gptk.training.state import TrainingState, whole
from gptk.weights.saving import write_model


@dataclass(frozen=True, eq=False)
class RunCheckpoints:
    """Saves and loads the checkpoints of a run; without a run directory there are none."""

    directory: RunDirectory | None
    config: TrainConfig
    processes: Processes
    model: GPT
    tokenizer: Tokenizer | None
    state: TrainingState
    progress: TrainingProgress

    def save(self, *, shard: bool) -> Path | None:
        """See `Trainer.save`. shard: each process writes its shards of the training state."""
        if self.directory is None:
            return None
        weights = self.state.whole_weights()
        averaged = self.state.averaged()
        models = {"": weights} | ({} if averaged is None else {"averaged": whole(averaged)})
        run = self.directory.path
        try:
            if self.processes.main:
                self.directory.claim()
            saved = self._write(run, models, shard)
            if self.processes.main:
                self.directory.saved()
        except (OSError, SafetensorError, SourceError) as error:
            with contextlib.suppress(OSError):  # of a disk that has become read-only
                checkpoints.clean(run)
            raise TrainingError(
                f"the checkpoint of step {self.progress.step} cannot be written: {error}; "
                f"{self.last_good()}"
            ) from None
        return saved

    def _write(self, run: Path, models: dict[str, dict[str, Tensor]], shard: bool) -> Path:
        """models: weights by folder of the checkpoint."""
        main = self.processes.main
        new = checkpoints.temporary(run, self.progress.step) if main else run
        new = Path(self.processes.broadcast(str(new)))
        if main and not (run / CONFIG).exists():
            write_text(run / CONFIG, self.config.to_toml(comments=True))
        self._write_state(new, shard)
        if main:
            for folder, weights in models.items():
                (new / folder).mkdir(exist_ok=True)
                write_model(new / folder, self.model.config, weights, self.tokenizer)
            settings = self.config.model_dump(mode="json")
            saved = self.progress.saved(self.processes.count, settings, self.state.describe())
            text = saved.model_dump_json(indent=1)
            (new / checkpoints.STATE).write_text(text, encoding="utf-8")
            new = checkpoints.publish(new, keep=self.config.keep)
        self.processes.barrier()
        return new

    def _write_state(self, new: Path, shard: bool) -> None:
        """Write the optimizer's and the regularizers' tensors.

        Raises OSError or SafetensorError in every process if any process could not write.
        """
        failure: OSError | SafetensorError | None = None
        try:
            self.state.write(new, shard=shard, rank=self.processes.rank)
        except (OSError, SafetensorError) as error:
            failure = error
        if self.processes.any(failure is not None):
            raise failure or OSError("another process could not write its part")

    def load(self, folder: Path, saved: SavedProgress) -> None:
        """Restore all but the weights, which are already in the model, from a checkpoint.

        saved: what its training.json holds. Raises TrainingError.
        """
        self.progress.restore(saved)
        self.state.read(folder, saved.tensors)

    def last_good(self) -> str:
        """Names the checkpoint to resume from, for the message of an error that ends the run."""
        try:
            if self.directory is None:
                return "there is no checkpoint"
            run = self.directory.path
            last = checkpoints.newest_intact(run, lambda _: None)
        except (OSError, TrainingError):
            return "there is no checkpoint to go on from"
        return f"the last good checkpoint is {last}, go on from it with --resume {run}"
