"""What a training plug-in is: LR schedulers, regularizers and observers.

The loop that calls them is in `gptk.training`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptk.model.gpt import GPT


class LRScheduler(Plugin):
    """The learning rate as a pure function of the step, so that a resumed run continues it.

    A subclass defines `factor`. Every scheduler has the option `warmup`: that many steps in which
    the rate rises linearly to where the schedule begins. Calling a scheduler gives the factor with
    warmup included.
    """

    kind: ClassVar[str] = "scheduler"
    positional: ClassVar[str] = "warmup"
    """The option that a spec may give without its name."""

    warmup: int = Field(0, ge=0, description="steps of linear warmup before the schedule begins")

    def factor(self, step: int, total_steps: int) -> float:
        """The share of the peak learning rate at `step`, 0 to `total_steps` - 1, without warmup."""
        raise NotImplementedError(f"{type(self).__name__} does not define factor()")

    def __call__(self, step: int, total_steps: int) -> float:
        """The share of the peak learning rate for the update number `step`, counted from 0.

        In warmup it is factor(0) times (step + 1) / (warmup + 1), as in nanoGPT: not zero in the
        first step, and in equal rises up to the first step after it. Steps past the end get the
        last one's factor.
        """
        step = min(step, max(total_steps - 1, 0))
        rest = max(total_steps - self.warmup, 1)
        if step < self.warmup:
            return self.factor(0, rest) * (step + 1) / (self.warmup + 1)
        return self.factor(step - self.warmup, rest)


class Regularizer(Plugin):
    """Something that keeps training from overfitting or diverging; each method may do nothing.

    An instance holds options and no state. What must be remembered from step to step, and saved
    with a checkpoint, goes into the `state` that the trainer keeps for it.
    """

    kind: ClassVar[str] = "regularizer"

    logits: ClassVar[Literal["batch", "chunks", "none"]] = "batch"
    """Which logits `loss` and `penalty` use, if the class overrides them. `batch`: those of a whole
    batch, which are then all in memory at once. `chunks`: those of a few positions at a time; what
    the methods return must be a mean over these positions, and depend on weights through the
    logits only. `none`: no logits; the methods are called once, with logits of zero positions."""

    def setup(self, model: "GPT") -> None:
        """Change the model before training begins or goes on, for example its dropout."""

    def parameter_options(
        self, module: "nn.Module", name: str, parameter: "Tensor"
    ) -> Mapping[str, float]:
        """Optimizer options of one parameter, for example {"weight_decay": 0.1}.

        name: the full name in the model (`blocks.0.attn.qkv.weight`); module: the module that
        owns it. `lr_scale` multiplies the learning rate. Parameters whose options agree share a
        group.
        """
        return {}

    def loss(self, loss: "Tensor", logits: "Tensor", targets: "Tensor") -> "Tensor":
        """The training loss in place of `loss`, the mean cross entropy.

        logits: (batch, time, vocab), float32; targets: (batch, time). In chunks, batch is
        1 and time a number of positions, which may be of several rows.
        """
        return loss

    def penalty(self, model: "GPT", logits: "Tensor", targets: "Tensor") -> "Tensor | float":
        """What is added to the loss, never below zero. Shapes as for `loss`."""
        return 0.0

    def before_step(self, model: "GPT") -> "Mapping[str, Tensor | float] | None":
        """Change the gradients in place, after the backward pass and before the optimizer.

        May return figures to log, such as {"grad_norm": norm}.
        """
        return None

    def after_step(self, model: "GPT", state: "dict[str, Tensor]") -> None:
        """Called after the optimizer's step; `state` is empty the first time."""

    def averaged(self, state: "Mapping[str, Tensor]") -> "Mapping[str, Tensor] | None":
        """Weights by parameter name, to be evaluated and saved beside the trained ones."""
        return None


class TrainingObserver(Plugin):
    """Sees every record of a training run: steps, evaluations, samples."""

    kind: ClassVar[str] = "training-observer"

    def start(self, run: Path | None) -> "TrainingListener":
        """Begin to listen. run: the run directory, or None if the run writes none."""
        raise NotImplementedError(f"{type(self).__name__} does not define start()")


class TrainingListener:
    """What `TrainingObserver.start` returns."""

    def record(self, record: Mapping[str, Any]) -> None:
        """One record, as a line of metrics.jsonl has it: see docs/training.md."""

    def close(self) -> None:
        """The run has ended, well or not."""
