"""Decoding observers: plug-ins that see each step of decoding and change nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.hooks.choice import Choice
    from gptk.hooks.results import Hypothesis
    from gptk.hooks.run import Run


@dataclass(frozen=True)
class DecodingStep:
    """What happened at one step: the rows before it, their logits, and the choice.

    Its tensors are copies: they may be kept, and written into.
    """

    number: int
    """Steps before this one."""
    rows: "Sequence[Hypothesis]"
    """The rows before the step: `prompt`, `sample`, `group`, `length` (new tokens so far), `total`
    (the sum of their log-probabilities)."""
    waiting: Sequence[bool]
    """With a draft: rows that take no part in this step, since they have no logits yet."""
    logits: "Tensor"
    """(rows, vocab) float32: the logits before the processors."""
    processed: "Tensor"
    """(rows, vocab) float32: the logits after the processors, by which the sampler chose."""
    removed: "Mapping[str, Tensor]"
    """For each processor, in order, how many tokens it took out of each row: (rows,) int64. Two of
    the same name are counted together."""
    choice: "Choice"
    """The tokens chosen with their log-probabilities and scores, as candidates; the parents say
    which of the rows each extends (None: candidate i extends row i)."""
    outcomes: "Sequence[Hypothesis | None]"
    """For each candidate the row that it makes, with a `reason` if it ends; None for one that is
    not taken, or whose row waits."""

    @property
    def parents(self) -> list[int]:
        """For each candidate the row that it extends."""
        parents = self.choice.parents
        return list(range(len(self.choice.tokens))) if parents is None else parents.tolist()

    @property
    def entropy(self) -> "Tensor":
        """(rows,) float32: the entropy of the processed distribution, in nats."""
        logprobs = self.processed.log_softmax(dim=-1)
        return -(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(dim=-1)


class DecodingObserver(Plugin):
    """Sees every step of decoding, for `--observer`."""

    kind: ClassVar[str] = "decoding-observer"

    @classmethod
    def to_file(cls, path: str) -> "DecodingObserver | None":
        """An observer that writes every step to a file, for `--trace`, or None [None]."""
        return None

    def start(self, run: "Run") -> "DecodingListener":
        """Begin to listen to one run, of all the prompts of a call."""
        raise NotImplementedError(f"{type(self).__name__} does not define start()")


class DecodingListener:
    """What `DecodingObserver.start` returns.

    If it raises an error, a warning names the observer, and it is told of no later step; decoding
    goes on.
    """

    def step(self, step: DecodingStep) -> None:
        """A step was chosen, and the rows are about to move."""

    def close(self) -> None:
        """The run has ended, well or not."""
