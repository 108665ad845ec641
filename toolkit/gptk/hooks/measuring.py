"""The contract of metrics, which measure the results of strategies that are compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    from gptk.hooks.results import Generation


class Metric(Plugin):
    """Measures the results of a prompt, for `gptk compare --metric`."""

    kind: ClassVar[str] = "metric"

    def measure(
        self, results: "Sequence[Generation]", logprobs: Sequence[Sequence[float]]
    ) -> float | None:
        """A finite number for all results of a prompt together; None where they are too short or
        too few.

        logprobs: of each result the log-probability of each token under the model itself, without
        processors: nats. Those in the results are of the distributions that the sampler chose from.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define measure()")

    def weight(self, results: "Sequence[Generation]") -> float:
        """What the number of a prompt weighs in the mean over prompts [1]."""
        return 1.0
