"""Saving and resuming a run; `gptk.runs.checkpoints` says what a checkpoint holds."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from gptk.errors import SourceError, TrainingError
from gptk.model.gpt import GPT
from gptk.runs import checkpoints
from gptk.runs.directory import CONFIG
from gptk.system.files import write_text
from gptk.text.tokenizer import Tokenizer
from gptk.training import state as training_state
from gptk.training.config import TrainConfig
from gptk.training.processes import Processes
from gptk.training.progress import TrainingProgress
from gptk.training.state import TrainingState
from gptk.weights.saving import write_model


@dataclass(frozen=True, eq=False)
class RunCheckpoints:
    """Saves and loads the checkpoints of a run; without a run directory there are none."""

    run: Path | None
    config: TrainConfig
    processes: Processes
    model: GPT
    tokenizer: Tokenizer | None
    state: TrainingState
    progress: TrainingProgress

    def save(self, *, shard: bool) -> Path | None:
        """See `Trainer.save`. shard: each process writes its shards of the training state."""
        if self.run is None:
            return None
        weights = self.state.whole_weights()
        averaged = self.state.averaged()
        if averaged is not None:
            averaged = training_state.whole(averaged)
        models = {"": weights} | ({} if averaged is None else {"averaged": averaged})
        try:
            return self._write(self.run, models, shard)
        except (OSError, SafetensorError, SourceError) as error:
            checkpoints.clean(self.run)
            raise TrainingError(
                f"the checkpoint of step {self.progress.step} cannot be written: {error}; "
                f"{self.last_good()}"
            ) from None

    def _write(self, run: Path, models: dict[str, dict[str, Tensor]], shard: bool) -> Path:
        """models: weights by folder of the checkpoint."""
        main = self.processes.main
        new = checkpoints.temporary(run, self.progress.step) if main else None
        new = self.processes.broadcast(new)
        assert new is not None
        if main and not (run / CONFIG).exists():
            write_text(run / CONFIG, self.config.to_toml(comments=True))
        tensors = self.state.tensors()
        training_state.write(new, tensors, shard=shard, main=main)
        self.processes.barrier()
        if main:
            for folder, weights in models.items():
                (new / folder).mkdir(exist_ok=True)
                write_model(new / folder, self.model.config, weights, self.tokenizer)
            text = json.dumps(self._training_json(training_state.describe(tensors)), indent=1)
            (new / checkpoints.STATE).write_text(text, encoding="utf-8")
            new = checkpoints.publish(new, keep=self.config.keep)
        self.processes.barrier()
        return new

    def _training_json(self, tensors: training_state.Stored) -> dict[str, object]:
        """The content of training.json. tensors: dtype and shape of each saved tensor."""
        return {
            "format": 1,
            **self.progress.to_json(),
            # All random numbers follow from these two and the step.
            "seed": self.config.seed,
            "processes": self.processes.count,
            "data": self.progress.data_sums,
            "tensors": tensors,
        }

    def load(self, folder: Path) -> list[str] | None:
        """Restore all but the weights, which are already in the model, from a checkpoint.

        Returns the SHA-256 of each token file that the run was trained on, None if it has no files.
        """
        try:
            saved = json.loads((folder / checkpoints.STATE).read_text(encoding="utf-8"))
            self.progress.restore(saved)
            stored = saved["tensors"]
            data_sums: list[str] | None = saved["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{folder / checkpoints.STATE} cannot be read: {error}") from None
        self.state.read(folder, stored)
        return data_sums

    def last_good(self) -> str:
        """Names the checkpoint to resume from, for the message of an error that ends the run."""
        last = None if self.run is None else checkpoints.last_checkpoint(self.run)
        if last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {last}, go on from it with --resume {self.run}"
