"""The listeners of a run, which get its records, and the observers that start some of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptk.errors import GptkError
from gptk.hooks.training import TrainingListener, TrainingObserver
from gptk.plugins.blame import warn_of_failure


class Listeners:
    """All listeners of one training run.

    An error of a listener ends the run. If the listener of an observer (a plug-in) fails, a warning
    names the observer, its listener gets no more records, and training goes on.
    """

    def __init__(self) -> None:
        self._listeners: list[TrainingListener] = []
        self._observers: list[tuple[TrainingObserver, TrainingListener]] = []

    def add(self, listeners: Iterable[TrainingListener]) -> None:
        self._listeners += listeners

    def start(self, observers: Iterable[TrainingObserver], run: Path | None) -> None:
        """Start the observers of a run. Raises their GptkErrors; other errors become warnings."""
        for observer in observers:
            try:
                self._observers.append((observer, observer.start(run)))
            except GptkError:  # raised on purpose, such as for a package that is not installed
                raise
            except Exception as error:
                warn_of_failure(observer, error)

    def tell(self, record: Mapping[str, Any]) -> None:
        for listener in self._listeners:
            listener.record(record)
        for observer, listener in list(self._observers):
            with self._dropped_on_failure(observer):
                listener.record(record)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for observer, listener in self._observers:
            with self._dropped_on_failure(observer):
                listener.close()

    @contextmanager
    def _dropped_on_failure(self, observer: TrainingObserver) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._observers = [entry for entry in self._observers if entry[0] is not observer]
            warn_of_failure(observer, error)
