"""A run: a function that uses the model, which the engine suspends where it needs a pass."""

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, greenlet

from gptk.engine.reading import LogitsWanted, Reading
from gptk.model.blocks import BlockCache

T = TypeVar("T")
Wanted = Reading | LogitsWanted


class CancelledError(GreenletExit):
    """Raised in a run that is cancelled, where it is suspended."""


class Run(Generic[T]):
    """A function under way; `result` waits for what it returns.

    rows: how many rows it decodes at the same time.
    """

    def __init__(
        self, function: Callable[[], T], rows: int, done: "Callable[[Run[T]], None] | None" = None
    ) -> None:
        self.rows = rows
        self.wanted: Wanted | None = None
        """What it is suspended for."""
        self.of: Any = None
        """Whom it wants that of, the passes of a model."""
        self.used: set[Any] = set()
        """The passes of all models that it has wanted something of."""
        self.answer: Any = None
        """What it wanted, or an exception, once it is there."""
        self.cache: BlockCache | None = None
        """The last one that it has read with."""
        self.number = -1
        """Counts the engine's runs in the order in which they began; where memory is short, those
        with higher numbers wait for those with lower ones."""
        self.threads = torch.get_num_threads()
        self._function: Callable[[], T] | None = function
        self._context = contextvars.copy_context()
        self._greenlet: greenlet | None = None
        self._done = done
        self._ended = threading.Event()
        self._value: T
        self._error: BaseException | None = None
        self.is_cancelled = False
        """See `cancel`."""

    @property
    def is_set_back(self) -> bool:
        """Whether it waits for memory to read again what was taken from it."""
        return isinstance(self.wanted, Reading) and self.wanted.is_lost

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def cancel(self) -> None:
        """End it where it is suspended, or before it begins. It is then `CancelledError`."""
        self.is_cancelled = True

    def result(self) -> T:
        """Wait until it has ended. Raises what it raised; if the wait is interrupted, as by Ctrl-C,
        the run is cancelled."""
        try:
            self._ended.wait()
        except BaseException:
            self.cancel()
            self._ended.wait(_PATIENCE)
            raise
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        return self._value

    # What follows is for the engine, in its thread.

    def go_on(self) -> bool:
        """Run until it wants something of the model, or to its end; says whether it goes on."""
        answer, self.answer = self.answer, None
        if self.is_cancelled:
            answer = CancelledError()
        if self._greenlet is None:
            if isinstance(answer, BaseException):
                self._error = answer
                return False
            self._greenlet = greenlet(self._work)
            self._greenlet.gr_context = self._context
            suspended = self._greenlet.switch()
        elif isinstance(answer, BaseException):
            suspended = self._greenlet.throw(answer)
        else:
            suspended = self._greenlet.switch(answer)
        if suspended is not None:
            self.of, self.wanted = suspended
            self.used.add(self.of)
            return True
        return False

    @property
    def has_failed(self) -> bool:
        """Whether it went to its end by an error, a cancellation included."""
        return self._error is not None

    def end(self, error: BaseException | None = None) -> None:
        """Tell who waits for it. error: that of the engine, if this ends it."""
        self._error = error or self._error
        self._greenlet = self._function = self.wanted = self.cache = None
        self._ended.set()
        done, self._done = self._done, None
        if done is not None:
            done(self)

    def _work(self) -> None:
        assert self._function is not None
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error


_PATIENCE = 5.0
"""Seconds to wait for a run that was cancelled: a pass of others may be under way."""
