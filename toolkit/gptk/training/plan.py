"""The size of a step and the number of steps, as they follow from settings and data."""

from dataclasses import dataclass

import torch

from gptk.data.windows import Windows, check_enough
from gptk.errors import OptionError
from gptk.model.gpt import GPT
from gptk.training.config import TrainConfig


@dataclass(frozen=True)
class TrainingPlan:
    """How the training windows divide into steps."""

    config: TrainConfig
    train: Windows
    validation: Windows
    process_count: int

    @property
    def context_length(self) -> int:
        """Tokens in a window."""
        return self.train.context_length

    @property
    def step_windows(self) -> int:
        """Windows in a step: those of all accumulated batches, in all processes."""
        return self.config.batch_size * self.config.accumulate * self.process_count

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take each training window once, except those that drop_last leaves out."""
        whole, rest = divmod(len(self.train), self.step_windows)
        return whole + (1 if rest and not self.config.drop_last else 0)

    @property
    def total_steps(self) -> int:
        """Steps in the whole run."""
        if self.config.epochs is not None:
            return max(1, round(self.config.epochs * self.steps_per_epoch))
        return self.config.steps

    def check(self) -> None:
        """Raise DataError if there are too few windows, OptionError if steps would be unequal."""
        config = self.config
        ratio = None if config.validation_data else config.train_ratio
        least = self.step_windows if config.drop_last else 1
        for which, windows, batch in (
            ("training", self.train, least),
            ("validation", self.validation, 1),
        ):
            check_enough(
                windows,
                batch,
                which=which,
                context_length=self.context_length,
                train_ratio=ratio,
            )
        if self.process_count > 1 and not config.drop_last:
            raise OptionError("drop_last=false works in one process only: batches must be full")

    def describe(self, model: GPT, dtype: torch.dtype, *, shard: bool) -> list[str]:
        """The run in a few lines: sizes, counts of tokens and batches, steps and hardware."""
        config, batch = self.config, self.config.batch_size
        parameters = sum(parameter.numel() for parameter in model.parameters())
        lines = [
            f"model: {parameters:,} parameters, vocabulary {model.config.vocab_size:,}, "
            f"window {model.config.context_length:,}",
        ]
        for name, windows, full_only in (
            ("training", self.train, config.drop_last),
            ("validation", self.validation, False),
        ):
            batches = len(windows) // batch if full_only else -(-len(windows) // batch)
            lines.append(
                f"{name}: {len(windows.tokens):,} tokens, {batches:,} batches of {batch} by "
                f"{self.context_length}"
            )
        lines.append(
            f"{self.total_steps:,} steps of {self.step_windows * self.context_length:,} tokens, "
            f"{self.total_steps / self.steps_per_epoch:.2f} epochs; "
            f"device {model.device}, {str(dtype).removeprefix('torch.')}"
            + (f", {self.process_count} processes" if self.process_count > 1 else "")
            + (", sharded" if shard else "")
        )
        return lines
