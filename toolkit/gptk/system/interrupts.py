"""Ctrl-C as a request to stop at the next good moment, or as the end of the process."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn


class Interrupted(KeyboardInterrupt):
    """Raised for a signal; exit_code: that of a program which a signal has ended."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


_raised: int | None = None


def raised() -> int | None:
    """The first signal of which KeyboardInterrupt was raised.

    Also one of which some library made another error, as pydantic does while it builds a class.
    """
    return _raised


def remember() -> None:
    """From now on Ctrl-C raises Interrupted, and `raised` remembers it. For the main thread."""
    global _raised
    _raised = None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise)


def _raise(number: int, _frame: FrameType | None = None) -> NoReturn:
    global _raised
    _raised = _raised or number
    raise Interrupted(number)


class Interrupts:
    """Inside `with`, Ctrl-C and SIGTERM set `asked`; a second one raises Interrupted.

    at_once: the first one raises it, too. Where an exception cannot be raised, as in a destructor,
    Python prints and forgets it: look at `asked` as well. Outside the main thread, which alone
    receives signals, it does nothing.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.number: int | None = None
        """The first signal that came."""
        self._at_once, self._is_left = at_once, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_left = True
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        raises = not self._is_left if self.asked else self._at_once
        self.number = self.number or number
        if raises:
            _raise(self.number)


@contextlib.contextmanager
def exiting() -> Iterator[None]:
    """Within the block, Ctrl-C ends the process at once, with exit code 130.

    For imports: KeyboardInterrupt in the midst of one is caught by some libraries, and becomes
    another error in others. Does nothing outside the main thread, or where somebody handles Ctrl-C.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not is_main or before not in (signal.default_int_handler, _raise):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
