"""The observers of a run: what they are told of each step, and what happens if one fails."""

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType

from gptk.errors import GptkError
from gptk.hooks.choice import Choice
from gptk.hooks.observing import DecodingListener, DecodingObserver, DecodingStep
from gptk.hooks.run import Run
from gptk.plugins.blame import warn_of_failure


class Listeners:
    """The started observers of a run. An observer that fails is named in a warning and dropped."""

    def __init__(self) -> None:
        self._listeners: list[tuple[DecodingObserver, DecodingListener]] = []

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def start(self, run: Run, observers: Sequence[DecodingObserver]) -> None:
        """Let observers begin to listen.

        A GptkError, such as for a file that cannot be written, is raised to the caller.
        """
        try:
            for observer in observers:
                try:
                    self._listeners.append((observer, observer.start(run)))
                except GptkError:
                    raise
                except Exception as error:
                    warn_of_failure(observer, error)
        except BaseException:
            self.close()
            raise

    def tell(self, step: DecodingStep) -> None:
        """Tell the listeners of a choice. Each gets tensors of its own."""
        for entry in list(self._listeners):
            observer, listener = entry
            try:
                listener.step(_copy(step))
            except Exception as error:
                self._listeners.remove(entry)
                warn_of_failure(observer, error)

    def close(self) -> None:
        """Tell the listeners that the run has ended."""
        for observer, listener in self._listeners:
            try:
                listener.close()
            except Exception as error:
                warn_of_failure(observer, error)
        self._listeners = []


def _copy(step: DecodingStep) -> DecodingStep:
    """The step with tensors of its own, which an observer may keep or write into."""
    choice = step.choice
    parents = choice.parents
    return dataclasses.replace(
        step,
        logits=step.logits.clone(),
        processed=step.processed.clone(),
        removed=MappingProxyType({name: count.clone() for name, count in step.removed.items()}),
        choice=Choice(
            tokens=choice.tokens.clone(),
            logprobs=choice.logprobs.clone(),
            scores=choice.scores.clone(),
            parents=None if parents is None else parents.clone(),
        ),
    )
