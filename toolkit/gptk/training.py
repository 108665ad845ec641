"""What a training plug-in is: LR schedulers and regularizers."""

from typing import TYPE_CHECKING, ClassVar

from gptk.plugins import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.model import GPT


class LRScheduler(Plugin):
    """The learning rate as a pure function of the step, so that a resumed run continues it."""

    kind: ClassVar[str] = "scheduler"

    def factor(self, step: int, total_steps: int) -> float:
        """The share of the base learning rate at `step`, from 0 to `total_steps` - 1."""
        raise NotImplementedError(f"{type(self).__name__} does not define factor()")


class Regularizer(Plugin):
    """Something that keeps training from overfitting or diverging; each method may do nothing."""

    kind: ClassVar[str] = "regularizer"

    def penalty(self, model: "GPT", logits: "Tensor", targets: "Tensor") -> "Tensor | float":
        """What is added to the mean loss. logits: (batch, time, vocab); targets: (batch, time)."""
        return 0.0

    def before_step(self, model: "GPT") -> None:
        """Change the gradients in place, after the backward pass and before the optimizer."""
