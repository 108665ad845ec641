"""Ctrl-C as a request to stop at the next good moment."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Inside `with`, Ctrl-C and SIGTERM set `asked`; a second one raises KeyboardInterrupt.

    Outside the main thread, which alone receives signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
