"""One optimizer step: data, backward passes, gradients, and the optimizer.

A step is a pure function of the weights, the optimizer's state and the step's number: the learning
rate, the windows and the random numbers (dropout) all follow from that number and the seed.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from gptk.errors import TrainingError
from gptk.model.gpt import GPT
from gptk.plugins.blame import expect
from gptk.training.config import TrainConfig
from gptk.training.gradients import gradient_norm
from gptk.training.loader import StepData, StepLoader
from gptk.training.loss import BatchLoss
from gptk.training.plugins import TrainingPlugins
from gptk.training.processes import Processes
from gptk.training.progress import TrainingProgress
from gptk.training.state import TrainingState


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """Takes the next step of a run when called; see `Trainer.step`."""

    config: TrainConfig
    plugins: TrainingPlugins
    processes: Processes
    model: GPT
    loader: StepLoader
    loss: BatchLoss
    state: TrainingState
    progress: TrainingProgress
    total_steps: int
    last_good: Callable[[], str]
    """Names the checkpoint to resume from, for errors."""

    def __call__(self) -> dict[str, Any]:
        progress, optimizer = self.progress, self.state.optimizer
        self.model.train()
        data = self.loader.take(progress.epoch, progress.position)
        progress.epoch, progress.position = data.epoch, data.position
        lr = self._set_learning_rate()
        totals = self.processes.sum(self._backward(data))
        loss, objective = (total / self.processes.count for total in totals)
        figures: dict[str, float] = {}
        if math.isfinite(objective):
            figures = self._change_gradients()
        finite = math.isfinite(objective) and math.isfinite(figures["grad_norm"])
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not finite and self.config.on_nan == "stop":
            raise TrainingError(self._not_finite_message(loss, objective, figures, data))
        progress.step += 1
        progress.tokens += len(data.windows) * self.loader.windows.context_length
        progress.position += len(data.windows)
        if finite:
            for regularizer in self.plugins.regularizers:
                regularizer.after_step(self.model, self.state.regularizer_states[regularizer.name])
        return {
            "kind": "step",
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": loss,
            **({"objective": objective} if objective != loss else {}),
            "lr": lr,
            **figures,
            **({} if finite else {"skipped": True}),
        }

    def _set_learning_rate(self) -> float:
        scheduler = self.plugins.scheduler
        factor = scheduler(self.progress.step, self.total_steps)
        lr = self.config.lr * expect(scheduler, "factor", factor, Real, "a number")
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def _backward(self, data: StepData) -> list[float]:
        """Gradients of the mean objective over this process's windows.

        Returns loss and objective.
        """
        device = self.model.device
        means, shares = [], []
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(
                _random_seed(self.config.seed, self.progress.step, self.processes.rank)
            )
            for number, batch in enumerate(data.batches, start=1):
                share = len(batch[0]) / len(data.local_windows)
                last = number == len(data.batches)
                with nullcontext() if last else self.loss.without_sync():
                    loss, objective = self.loss(batch)
                    torch.autograd.backward(objective * share)
                means.append(torch.stack((loss.detach(), objective.detach())))
                shares.append(share)
        # Summed here: the device may not have float64, and is asked for results only once a step.
        rows = zip(torch.stack(means).tolist(), shares, strict=True)
        weighted = [(loss * share, objective * share) for (loss, objective), share in rows]
        return [sum(column) for column in zip(*weighted, strict=True)]

    def _change_gradients(self) -> dict[str, float]:
        """Have the regularizers change the gradients. Returns their figures and grad_norm."""
        figures: dict[str, float] = {}
        for regularizer in self.plugins.regularizers:
            returned = expect(
                regularizer,
                "before_step",
                regularizer.before_step(self.model) or {},
                Mapping,
                "figures by name, or None",
            )
            figures |= {name: float(value) for name, value in returned.items()}
        if "grad_norm" not in figures:
            figures["grad_norm"] = float(gradient_norm(self.state.parameters.values()))
        return figures

    def _not_finite_message(
        self, loss: float, objective: float, figures: Mapping[str, float], data: StepData
    ) -> str:
        """The error message: what is not finite, where in the data, and what may help."""
        what = f"the loss is {loss}"
        if math.isfinite(loss) and not math.isfinite(objective):
            what = f"the loss is {loss:.4f}, but {objective} with the regularizers' terms"
        elif math.isfinite(loss):
            what = f"the gradient's norm is {figures['grad_norm']}, the loss {loss:.4f}"
        return (
            f"step {self.progress.step + 1}: {what}; its windows begin at the tokens "
            f"{self._starts(data.windows)} of the training data (epoch {data.epoch + 1}). Try a "
            f"lower lr, grad-clip, or on_nan=skip; {self.last_good()}"
        )

    def _starts(self, windows: np.ndarray) -> str:
        """The positions where windows begin, as text: eight, and how many more."""
        starts = ", ".join(str(self.loader.windows.start(int(window))) for window in windows[:8])
        return starts + (f" and {len(windows) - 8} more" if len(windows) > 8 else "")


def _random_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one process's random numbers in one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
