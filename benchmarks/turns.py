"""Functions that take turns, so that what else the machine does meets all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

Timed = Callable[[], object]
"""What it returns as a float are seconds that it took of its own time, instead of all of it."""


def in_turns(functions: Mapping[str, Timed], rounds: int = 5) -> dict[str, float]:
    """The median of each one's seconds over rounds ABAB…, after a round that does not count.

    Garbage is collected before each, and what was there before is not looked at again.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.freeze()
    try:
        for turn in range(rounds + 1):
            for name, function in functions.items():
                gc.collect()
                start = time.perf_counter()
                result = function()
                seconds = time.perf_counter() - start
                if turn:
                    taken[name].append(result if isinstance(result, float) else seconds)
                del result
    finally:
        gc.unfreeze()
    return {name: statistics.median(times) for name, times in taken.items()}
