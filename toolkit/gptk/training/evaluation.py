"""Evaluation: mean losses over a fixed set of batches, and text sampled from the model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptk.data.windows import Windows
from gptk.hooks.sampling import Sampler
from gptk.hooks.weights import Checkpoint
from gptk.language_model import LanguageModel
from gptk.model.gpt import GPT
from gptk.text.tokenizer import Tokenizer
from gptk.training.config import TrainConfig
from gptk.training.loss import BatchLoss
from gptk.training.processes import Processes
from gptk.training.progress import TrainingProgress
from gptk.training.state import TrainingState
from gptk.weights.building import build_model


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates the weights of a run when called; see `Trainer.evaluate`."""

    config: TrainConfig
    processes: Processes
    model: GPT
    train: Windows
    validation: Windows
    loss: BatchLoss
    state: TrainingState
    progress: TrainingProgress

    def __call__(self) -> dict[str, Any]:
        start, progress = time.perf_counter(), self.progress
        record: dict[str, Any] = {
            "kind": "evaluation",
            "step": progress.step,
            "tokens": progress.tokens,
            "epoch": progress.epoch + progress.position / max(len(self.train), 1),
            "train_loss": self._mean_loss(self.train),
            "validation_loss": self._mean_loss(self.validation),
        }
        if (averaged := self.state.averaged()) is not None:
            with self.state.replaced_weights(averaged):
                record["averaged_validation_loss"] = self._mean_loss(self.validation)
        record["seconds"] = time.perf_counter() - start
        return record

    @torch.no_grad()
    def _mean_loss(self, windows: Windows) -> float:
        """The loss over `eval_batches` batches in each process, spread evenly over the data."""
        size, rank, processes = self.config.batch_size, self.processes.rank, self.processes.count
        count = min(self.config.eval_batches * size * processes, len(windows))
        chosen = np.arange(count) * len(windows) // count
        batches = [chosen[first : first + size] for first in range(0, count, size)]
        total = windows_seen = 0.0
        self.model.eval()
        for number in range(rank, rank + len(batches), processes):
            # A sharded model needs all processes in each pass: a process without a batch left
            # repeats the first one, and does not count it.
            repeated = number >= len(batches)
            batch = batches[0 if repeated else number]
            loss, _ = self.loss(windows.batch(batch))
            if not repeated:
                total += float(loss) * len(batch)
                windows_seen += len(batch)
        self.model.train()
        self.loss.reshard()
        total, windows_seen = self.processes.sum([total, windows_seen])
        return total / windows_seen


def sample_text(
    model: GPT,
    tokenizer: Tokenizer | None,
    sampler: Sampler,
    config: TrainConfig,
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Text for the prompt in the settings. weights: unsharded, for a model that is sharded."""
    if weights is not None:
        model = build_model(Checkpoint(model.config, weights), model.device, torch.float32)
    return (
        LanguageModel(model, tokenizer)
        .generate(
            config.sample_prompt,
            sampler=sampler,
            max_new_tokens=config.sample_tokens,
            seed=config.seed,
            overflow="slide",
        )
        .text
    )
