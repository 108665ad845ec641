"""Plots of training runs: losses, perplexity, learning rate and gradient norm, in one figure."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptk.errors import OptionError, SourceError
from gptk.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_POINTS = 2000
"""More steps than that are averaged in groups before they are drawn."""


def plot_runs(runs: Sequence[Path], target: Path, *, title: str | None = None) -> None:
    """Draw the metrics of training runs into one PNG, SVG or PDF, by the suffix of `target`.

    Panels: loss in nats a token over steps (and tokens seen), perplexity over tokens seen,
    learning rate over steps, and gradient norm over steps where it was recorded. One run tells
    training from validation by colour; several have a colour each. The same metrics give the same
    bytes. Raises SourceError for a run without metrics, OptionError for another suffix, and
    OSError if the file cannot be written.
    """
    check_format(target)
    histories = [_History(run) for run in runs]
    labels = _labels(runs)
    import matplotlib
    from matplotlib.figure import Figure

    panels = [_losses, _perplexity, _learning_rate]
    if any(one.has("grad_norm") for one in histories):
        panels.append(_gradient_norm)
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "gptk",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
        }
    ):
        figure = Figure(figsize=(10, 7), layout="constrained")
        for panel, axes in zip(panels, figure.subplots(2, 2).flat, strict=False):
            panel(axes, histories, labels)
        for axes in figure.axes[len(panels) : 4]:
            figure.delaxes(axes)
        if title:
            figure.suptitle(title)
        new = target.with_name(f".{secrets.token_hex(4)}{target.suffix}")
        try:
            # A date would make each file another.
            metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
            figure.savefig(new, dpi=150, metadata=metadata[target.suffix.lower()])
            os.replace(new, target)
        finally:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)


def check_format(target: Path) -> None:
    """Raise OptionError unless the suffix is that of a format that can be written."""
    if target.suffix.lower() not in FORMATS:
        raise OptionError(
            f"{target} has the suffix {target.suffix!r}; allowed: {', '.join(FORMATS)}"
        )


class _History:
    """One run's numbers as arrays."""

    def __init__(self, run: Path) -> None:
        if not run.is_dir():
            raise SourceError(f"{run} is not a training run: it is no directory")
        if not (run / "metrics.jsonl").is_file():
            raise SourceError(f"{run} is not a training run: it has no metrics.jsonl")
        records = read_metrics(run / "metrics.jsonl")
        self.steps = [one for one in records if one["kind"] == "step"]
        self.evaluations = [one for one in records if one["kind"] == "evaluation"]
        if not self.steps and not self.evaluations:
            raise SourceError(f"{run} has no metrics yet")

    def has(self, name: str) -> bool:
        return any(name in one for one in self.steps)

    def step(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Two columns of the steps, thinned to at most _POINTS points."""
        xs, ys = _columns(self.steps, x, y)
        size = -(-len(xs) // _POINTS)
        if size <= 1:
            return xs, ys
        edges = np.arange(0, len(xs), size)
        counts = np.diff(np.append(edges, len(xs)))
        return np.add.reduceat(xs, edges) / counts, np.add.reduceat(ys, edges) / counts

    def evaluation(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        return _columns(self.evaluations, x, y)


def _columns(records: Sequence[dict[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(one[x], one[y]) for one in records if one.get(y) is not None]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _labels(runs: Sequence[Path]) -> list[str]:
    """The directories' names, with as many parents as it takes to tell them apart."""
    paths = [run.resolve() for run in runs]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return labels


def _each(histories: Sequence[_History]) -> Iterator[tuple[str, str, _History]]:
    """A colour for training, one for validation, and the run."""
    for number, history in enumerate(histories):
        one = _COLOURS[number % len(_COLOURS)]
        yield (one, one, history) if len(histories) > 1 else (_COLOURS[0], _COLOURS[1], history)


def _losses(axes: "Axes", histories: Sequence[_History], labels: Sequence[str]) -> None:
    several = len(histories) > 1
    for (train, validation, history), label in zip(_each(histories), labels, strict=True):
        steps, losses = history.step("step", "loss")
        axes.plot(steps, losses, color=train, alpha=0.25, linewidth=0.8)
        if not several:
            axes.plot(steps, _smoothed(losses), color=train, linewidth=1.2, label="training")
        if not several:
            x, y = history.evaluation("step", "train_loss")
            axes.plot(x, y, ".", color=train, markersize=6, label="training, evaluated")
        x, y = history.evaluation("step", "validation_loss")
        axes.plot(
            x, y, ".-", color=validation, markersize=6, label=label if several else "validation"
        )
        x, y = history.evaluation("step", "averaged_validation_loss")
        if len(x):
            name = f"{label}, averaged" if several else "validation, averaged weights"
            axes.plot(x, y, ".--", color=validation, markersize=4, linewidth=1, label=name)
    axes.set(xlabel="step", ylabel="loss (nats/token)", title="Loss")
    if several:
        axes.set_title("Loss (lines with dots: validation; faint: training)")
    axes.legend(frameon=False)
    ratios = {
        round(one["tokens"] / one["step"], 6) for h in histories for one in h.steps if one["step"]
    }
    if len(ratios) == 1:  # else a step is not the same number of tokens everywhere
        ratio = ratios.pop()
        above = axes.secondary_xaxis(
            "top", functions=(lambda step: step * ratio, lambda tokens: tokens / ratio)
        )
        above.set_xlabel("tokens seen")
        above.xaxis.set_major_formatter(_short_numbers())


def _perplexity(axes: "Axes", histories: Sequence[_History], labels: Sequence[str]) -> None:
    several = len(histories) > 1
    for (train, validation, history), label in zip(_each(histories), labels, strict=True):
        if not several:
            x, y = history.evaluation("tokens", "train_loss")
            axes.plot(x, np.exp(y), ".-", color=train, label="training")
        x, y = history.evaluation("tokens", "validation_loss")
        axes.plot(x, np.exp(y), ".-", color=validation, label=label if several else "validation")
    axes.set(xlabel="tokens seen", ylabel="perplexity", title="Perplexity", yscale="log")
    axes.xaxis.set_major_formatter(_short_numbers())
    _plain_numbers(axes)
    axes.legend(frameon=False)


def _learning_rate(axes: "Axes", histories: Sequence[_History], labels: Sequence[str]) -> None:
    _over_steps(axes, histories, labels, "lr")
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


def _gradient_norm(axes: "Axes", histories: Sequence[_History], labels: Sequence[str]) -> None:
    _over_steps(axes, histories, labels, "grad_norm")
    axes.set(xlabel="step", ylabel="norm before clipping", title="Gradient norm", yscale="log")
    _plain_numbers(axes)


def _short_numbers() -> "Formatter":
    """1500000 as 1.5M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _plain_numbers(axes: "Axes") -> None:
    """0.5, 1, 20 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _over_steps(
    axes: "Axes", histories: Sequence[_History], labels: Sequence[str], name: str
) -> None:
    for (colour, _, history), label in zip(_each(histories), labels, strict=True):
        axes.plot(*history.step("step", name), color=colour, linewidth=1, label=label)
    if len(histories) > 1:
        axes.legend(frameon=False)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over about a thirtieth of the run, shorter at its ends."""
    width = max(1, len(values) // 30)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - width)
    return (sums[last] - sums[first]) / (last - first)
