"""Timing functions in turns, so that other load on the machine affects all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

Timed = Callable[[], object]
"""A function to time. If it returns a float, those are the seconds to count instead."""


def in_turns(functions: Mapping[str, Timed], rounds: int = 5) -> dict[str, float]:
    """The median seconds of each function over rounds ABAB…, after a warm-up round.

    Garbage is collected before each call; objects that existed before are frozen (gc.freeze).
    """
    timings: dict[str, list[float]] = {name: [] for name in functions}
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
                    timings[name].append(result if isinstance(result, float) else seconds)
                del result
    finally:
        gc.unfreeze()
    return {name: statistics.median(times) for name, times in timings.items()}
