"""Long and noisy curves, thinned and smoothed before they are drawn."""

from itertools import pairwise

import numpy as np

from gptk.plots.history import Points

_POINTS = 2000
"""The most points of a line that is drawn."""


def perplexity(loss: np.ndarray) -> np.ndarray:
    """exp(loss), at most exp(100): the loss of a run that diverged does not overflow."""
    return np.asarray(np.exp(np.minimum(loss, 100)))


def warmup_steps(steps: np.ndarray, rates: np.ndarray) -> float:
    """How many steps the learning rate rises from the first step on; 0 if it does not rise."""
    falls = np.flatnonzero(np.diff(rates) <= 0)
    last = falls[0] if len(falls) else max(len(rates) - 1, 0)
    return float(steps[last]) if last else 0.0


def extremes(x: np.ndarray, y: np.ndarray) -> Points:
    """A curve thinned to the least and greatest y of each group of neighbours: peaks stay."""
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(x), _POINTS // 2 + 1).astype(int)
    indices = {0, len(x) - 1}
    for first, last in pairwise(edges):
        indices |= {first + y[first:last].argmin(), first + y[first:last].argmax()}
    kept = sorted(indices)
    return x[kept], y[kept]


def means(x: np.ndarray, y: np.ndarray) -> Points:
    """A curve thinned to the means of groups of neighbours."""
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(x), _POINTS + 1).astype(int)
    sizes = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / sizes, np.add.reduceat(y, edges[:-1]) / sizes


def smoothed(y: np.ndarray) -> np.ndarray:
    """Local linear regression over each point's neighbours, a fiftieth of all points on each side.

    Inside the curve it is the neighbours' mean. The last point has neighbours on one side only,
    where a mean would lag; the first points have fewer, so that a steep fall stays steep.
    """
    x = np.arange(len(y), dtype=np.float64)
    half = np.minimum(x, len(y) // 50)
    first, last = (x - half).astype(int), np.minimum(x + half + 1, len(y)).astype(int)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.append(0.0, np.cumsum(values))
        return np.asarray((sums[last] - sums[first]) / (last - first))

    mean_x, mean_y = mean(x), mean(y)
    spread = np.maximum(mean(x * x) - mean_x**2, 1e-9)  # no slope for a point without neighbours
    return np.asarray(mean_y + (mean(x * y) - mean_x * mean_y) / spread * (x - mean_x))
