"""The observers of a run: what they are told of each step, and what happens if one fails."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from gptk.errors import GptkError
from gptk.hooks.choice import Choice
from gptk.hooks.observing import DecodingListener, DecodingObserver, DecodingStep
from gptk.hooks.results import Hypothesis
from gptk.hooks.run import Run
from gptk.plugins.blame import warn_of_failure


class Listeners:
    """The started observers of a run. An observer that fails is named in a warning and dropped."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._listeners: list[tuple[DecodingObserver, DecodingListener]] = []
        self._observed: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None
        """For the next choice: logits before and after the processors, and how many tokens each
        processor took out of each row. None until they are known."""
        self._lengths_at_choice = list(lengths)
        """The lengths of the rows for whose next tokens the sampler chooses."""

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

    def observe(
        self,
        lengths: Sequence[int],
        logits: Tensor,
        processed: Tensor,
        removed: dict[str, Tensor],
    ) -> None:
        """Keep logits, and what processors made of them, if the sampler chooses by these logits.

        A strategy may look ahead, or process logits twice. The logits of the choice are those that
        are processed first while the rows have the lengths that they have at the choice.
        """
        if self._observed is None and list(lengths) == self._lengths_at_choice:
            self._observed = logits, processed, removed

    @contextlib.contextmanager
    def ignoring(self) -> Iterator[None]:
        """Within the block, `observe` keeps nothing."""
        lengths, self._lengths_at_choice = self._lengths_at_choice, []
        try:
            yield
        finally:
            self._lengths_at_choice = lengths

    def tell(
        self,
        number: int,
        rows: Sequence[Hypothesis],
        waiting: Sequence[bool],
        choice: Choice,
        outcomes: Sequence[Hypothesis | None],
        logits: Tensor | None,
    ) -> None:
        """Tell the listeners of a choice.

        logits: the model's, which the sampler chose by if it asked for no processing.
        """
        if self._observed is None:
            assert logits is not None
            self._observed = logits, logits, {}
        unprocessed, processed, removed = self._observed
        step = DecodingStep(
            number=number,
            rows=tuple(rows),
            waiting=waiting[: len(rows)],
            logits=unprocessed,
            processed=processed,
            removed=removed,
            choice=choice,
            outcomes=outcomes,
        )
        self._observed = None
        for entry in list(self._listeners):
            observer, listener = entry
            try:
                listener.step(step)
            except Exception as error:
                self._listeners.remove(entry)
                warn_of_failure(observer, error)

    @property
    def has_observed(self) -> bool:
        """Whether the logits of the next choice have been processed."""
        return self._observed is not None

    def moved(self, lengths: Sequence[int]) -> None:
        """The rows have moved: these are their lengths at the next choice."""
        self._lengths_at_choice = list(lengths)

    def close(self) -> None:
        """Tell the listeners that the run has ended."""
        for observer, listener in self._listeners:
            try:
                listener.close()
            except Exception as error:
                warn_of_failure(observer, error)
        self._listeners = []
