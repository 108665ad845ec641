"""What is computed once a process, also if several threads need it at the same time."""

import functools
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class computed_once(Generic[Parameters, Result]):  # noqa: N801  (a decorator)
    """functools.cache, with which a function runs once for the same arguments.

    Threads that call it meanwhile wait for the result; functools.cache alone runs it in each.
    """

    def __init__(self, function: Callable[Parameters, Result]) -> None:
        functools.update_wrapper(self, function)
        self._cached = functools.cache(function)
        self._lock = threading.RLock()

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self._lock:
            return self._cached(*args, **kwargs)  # type: ignore[arg-type]

    def cache_clear(self) -> None:
        """Forget all results."""
        self._cached.cache_clear()
