"""Means over prompts and seeds."""

import math
import statistics
from collections.abc import Iterable


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if all are.

    >>> mean([1.0, None, 2.0])
    1.5
    """
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def standard_error(values: Iterable[float | None]) -> float | None:
    """The standard error of the mean of the values that are not None: s / √k, with s² = Σ (x - x̄)²
    / (k - 1) for k values. None for fewer than two.

    >>> standard_error([1.0, 2.0, 3.0])
    0.5773502691896258
    """
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    return statistics.stdev(known) / math.sqrt(len(known))
