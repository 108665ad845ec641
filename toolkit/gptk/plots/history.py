"""The metrics of a training run as arrays, to be drawn."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptk.errors import SourceError
from gptk.runs.metrics import METRICS, iterate_metrics

Points = tuple[np.ndarray, np.ndarray]
"""x and y, one-dimensional and of equal length."""


@dataclass(frozen=True)
class History:
    """The numbers of a run by name; NaN where a record lacks a number."""

    label: str
    steps: Mapping[str, np.ndarray]
    evaluations: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, run: Path, label: str) -> "History":
        """Read the metrics of a run. Raises SourceError if there is no run, or no record in it."""
        if not run.is_dir():
            raise SourceError(f"{run} is not a training run: it is no directory")
        if not (run / METRICS).is_file():
            raise SourceError(f"{run} is not a training run: it has no {METRICS}")
        losses = ("train_loss", "validation_loss", "averaged_validation_loss")
        columns = {
            "step": {n: array("d") for n in ("step", "tokens", "loss", "lr", "grad_norm")},
            "evaluation": {n: array("d") for n in ("step", "tokens", *losses)},
        }
        for record in iterate_metrics(run / METRICS):
            for name, column in columns.get(record["kind"], {}).items():
                value = record.get(name)
                value = np.nan if isinstance(value, bool) else value
                column.append(value if isinstance(value, int | float) else np.nan)
        steps, evaluations = (
            {name: np.array(column) for name, column in by_name.items()}
            for by_name in columns.values()
        )
        if not len(steps["step"]) and not len(evaluations["step"]):
            raise SourceError(f"{run} has no metrics yet")
        return cls(label, steps, evaluations)

    def step(self, y: str, *, positive: bool = False) -> Points:
        """Step numbers, and a column of the step records, where it was recorded."""
        x, values = _finite(self.steps["step"], self.steps[y])
        return (x[values > 0], values[values > 0]) if positive else (x, values)

    def evaluation(self, x: str, y: str) -> Points:
        """Two columns of the evaluations, where both were recorded."""
        return _finite(self.evaluations[x], self.evaluations[y])

    def progress(self) -> Points:
        """Steps and the tokens seen after each, both rising from 0."""
        kinds = (self.steps, self.evaluations)
        x, tokens = _finite(*(np.concatenate([k[n] for k in kinds]) for n in ("step", "tokens")))
        x, first = np.unique(np.append(0, x), return_index=True)
        tokens = np.append(0, tokens)[first]
        rising = np.append(True, tokens[1:] > np.maximum.accumulate(tokens)[:-1])
        return x[rising], tokens[rising]


def _finite(x: np.ndarray, y: np.ndarray) -> Points:
    both = np.isfinite(x) & np.isfinite(y)
    return x[both], y[both]
