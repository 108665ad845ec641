"""Notices that gptk runs slower here than it could, each told once in a process."""

import logging
import threading

_told: set[str] = set()
_lock = threading.Lock()


def tell_once(log: logging.Logger, notice: str) -> None:
    """Log a notice as a warning, unless this process has told it before.

    notice: what is slow, why, and what to do about it.
    """
    with _lock:
        if notice in _told:
            return
        _told.add(notice)
    log.warning(notice)
