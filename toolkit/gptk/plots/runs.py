"""Plots of training runs: losses, perplexity, learning rate and gradient norm, in one figure."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptk.errors import OptionError, SourceError
from gptk.plots.style import _GREY, COLOURS, MARKERS, check_format, style, write_figure
from gptk.runs.metrics import iterate_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_POINTS = 2000
"""A longer line is thinned to that many points before it is drawn."""


def plot_runs(runs: Sequence[Path], target: Path, *, title: str | None = None) -> None:
    """Draw the metrics of one or more training runs into a PNG, SVG or PDF, by target's suffix.

    Panels: loss in nats a token over steps (and tokens seen, where a step is as many tokens in
    all runs), perplexity over tokens seen, learning rate and gradient norm over steps; a panel
    for which nothing was recorded is left out. Losses and norms of single steps are drawn
    lightly, with a smoothed line. One run tells training from validation by colour; several have
    a colour and a marker each. The same metrics give the same bytes. Raises SourceError for a
    run without metrics, OptionError for another suffix, and OSError if the file cannot be written.
    """
    check_format(target)
    if not runs:
        raise OptionError("no training run to plot was given")
    histories = [_History.read(run, label) for run, label in zip(runs, _labels(runs), strict=True)]
    looks = _looks(len(histories))
    with style():
        figure = _figure(list(zip(histories, looks, strict=True)))
        if title:
            figure.suptitle(title)
        write_figure(figure, target)


_Points = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _History:
    """One run's numbers, an array for each name; what a record lacks is NaN."""

    label: str
    steps: Mapping[str, np.ndarray]
    evaluations: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, run: Path, label: str) -> "_History":
        if not run.is_dir():
            raise SourceError(f"{run} is not a training run: it is no directory")
        if not (run / "metrics.jsonl").is_file():
            raise SourceError(f"{run} is not a training run: it has no metrics.jsonl")
        losses = ("train_loss", "validation_loss", "averaged_validation_loss")
        columns = {
            "step": {n: array("d") for n in ("step", "tokens", "loss", "lr", "grad_norm")},
            "evaluation": {n: array("d") for n in ("step", "tokens", *losses)},
        }
        for record in iterate_metrics(run / "metrics.jsonl"):
            for name, column in columns.get(record["kind"], {}).items():
                value = record.get(name)
                column.append(value if isinstance(value, int | float) else np.nan)
        steps, evaluations = ({n: np.array(c) for n, c in one.items()} for one in columns.values())
        if not len(steps["step"]) and not len(evaluations["step"]):
            raise SourceError(f"{run} has no metrics yet")
        return cls(label, steps, evaluations)

    def step(self, y: str, *, positive: bool = False) -> _Points:
        """A column of the steps over their numbers, where it was recorded."""
        x, values = _finite(self.steps["step"], self.steps[y])
        return (x[values > 0], values[values > 0]) if positive else (x, values)

    def evaluation(self, x: str, y: str) -> _Points:
        return _finite(self.evaluations[x], self.evaluations[y])

    def progress(self) -> _Points:
        """Steps done and tokens seen then, both rising from 0."""
        both = (self.steps, self.evaluations)
        x, tokens = _finite(*(np.concatenate([one[n] for one in both]) for n in ("step", "tokens")))
        x, first = np.unique(np.append(0, x), return_index=True)
        tokens = np.append(0, tokens)[first]
        rising = np.append(True, tokens[1:] > np.maximum.accumulate(tokens)[:-1])
        return x[rising], tokens[rising]


@dataclass(frozen=True)
class _Look:
    training: str
    validation: str
    marker: str
    alone: bool

    @property
    def run_marker(self) -> str | None:
        """For a line that tells nothing but whose it is."""
        return None if self.alone else self.marker


_Runs = Sequence[tuple[_History, _Look]]


def _looks(count: int) -> list[_Look]:
    if count == 1:
        return [_Look(COLOURS[0], COLOURS[1], "s", alone=True)]
    colours = [COLOURS[number % len(COLOURS)] for number in range(count)]
    markers = [MARKERS[number % len(MARKERS)] for number in range(count)]
    return [_Look(c, c, m, alone=False) for c, m in zip(colours, markers, strict=True)]


def _labels(runs: Sequence[Path]) -> list[str]:
    """The directories' names, with as many parents as it takes to tell them apart."""
    paths = [run.resolve() for run in runs]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return labels


def _figure(runs: _Runs) -> "Figure":
    """The panels for which there is something to draw, and what the colours mean."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    histories = [history for history, _ in runs]
    panels: list[Callable[[Axes, _Runs], None]] = [_losses]
    if any(len(one.evaluation("tokens", "validation_loss")[0]) for one in histories):
        panels.append(_perplexity)
    if any(len(one.step("lr")[0]) for one in histories):
        panels.append(_learning_rate)
    if any(len(one.step("grad_norm", positive=True)[0]) for one in histories):
        panels.append(_gradient_norm)
    mosaic = {1: "0", 2: "01", 3: "00;12", 4: "01;23"}[len(panels)]
    rows = mosaic.split(";")
    figure = Figure(figsize=(4.2 * len(rows[0]), 3 * len(rows)), layout="constrained")
    for number, axes in figure.subplot_mosaic(mosaic).items():
        panels[int(number)](axes, runs)
    if len(runs) > 1:
        keys = [
            Line2D([], [], color=look.training, marker=look.marker, markersize=4)
            for _, look in runs
        ]
        longest = max(len(one.label) for one in histories)
        columns = max(1, min(len(runs), 110 // (longest + 8)))
        legend = figure.legend(keys, [""] * len(keys), loc="outside lower center", ncols=columns)
        for text, one in zip(legend.get_texts(), histories, strict=True):
            # Set here, a name may begin with _, and hold $ without becoming a formula.
            text.set_parse_math(False)
            text.set_text(one.label)
    return figure


def _losses(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        x, y = history.step("loss")
        _line(axes, *_extremes(x, y), color=look.training, alpha=0.25, linewidth=0.6)
        x, y = _means(x, y)
        width = 1.3 if look.alone else 0.9
        _line(axes, x, _smoothed(y), color=look.training, linewidth=width, label="training")
        if look.alone:  # with more runs it would be too much
            x, y = history.evaluation("step", "train_loss")
            _evaluated(axes, x, y, look, linestyle="None")
        _validation(axes, "step", history, look)
    _from_zero(axes, runs, "step")
    axes.set(xlabel="step", ylabel="loss (nats/token)")
    _tokens_above(axes, runs)
    _line_legend(axes, alone=len(runs) == 1)


def _perplexity(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        if look.alone:
            x, y = history.evaluation("tokens", "train_loss")
            _evaluated(axes, x, _exp(y), look, linestyle="-")
        _validation(axes, "tokens", history, look, _exp)
    _from_zero(axes, runs, "tokens")
    axes.set(xlabel="tokens seen", ylabel="perplexity", yscale="log")
    _plain_numbers(axes.yaxis)
    _line_legend(axes, alone=len(runs) == 1)


def _learning_rate(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        x, y = _extremes(*history.step("lr"))
        _line(axes, x, y, marker=look.run_marker, color=look.training, linewidth=1.3)
    _from_zero(axes, runs, "step")
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


def _gradient_norm(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        x, y = history.step("grad_norm", positive=True)
        _line(axes, *_extremes(x, y), color=look.training, alpha=0.25, linewidth=0.6)
        x, y = _means(x, np.log(y))
        y = np.exp(_smoothed(y))
        _line(axes, x, y, marker=look.run_marker, color=look.training, linewidth=1.3)
    _from_zero(axes, runs, "step")
    axes.set(xlabel="step", ylabel="gradient norm, before clipping", yscale="log")
    _plain_numbers(axes.yaxis)


def _evaluated(axes: "Axes", x: np.ndarray, y: np.ndarray, look: _Look, *, linestyle: str) -> None:
    style: dict[str, Any] = {"color": look.training, "marker": "o", "markerfacecolor": "white"}
    label = "training, evaluated"
    _line(axes, x, y, label=label, linestyle=linestyle, linewidth=1.3, **style)


def _validation(
    axes: "Axes",
    x: str,
    history: _History,
    look: _Look,
    scale: Callable[[np.ndarray], np.ndarray] = np.array,
) -> None:
    style: dict[str, Any] = {"color": look.validation, "marker": look.marker, "linewidth": 1.3}
    xs, ys = history.evaluation(x, "validation_loss")
    _line(axes, xs, scale(ys), label="validation", **style)
    xs, ys = history.evaluation(x, "averaged_validation_loss")
    style |= {"linestyle": "--", "markerfacecolor": "white"}
    _line(axes, xs, scale(ys), label="validation, averaged weights", **style)


# --- Lines


def _line(
    axes: "Axes", x: np.ndarray, y: np.ndarray, *, marker: str | None = None, **style: Any
) -> None:
    """Draw, unless there is nothing, with thirty markers at most; a single point has one."""
    if len(x):
        if len(x) == 1:
            marker = marker or "o"
        every = max(1, len(x) // 15)
        axes.plot(x, y, marker=marker, markersize=3.5, markevery=every, **style)


def _finite(x: np.ndarray, y: np.ndarray) -> _Points:
    both = np.isfinite(x) & np.isfinite(y)
    return x[both], y[both]


def _exp(loss: np.ndarray) -> np.ndarray:
    """Perplexity. Of a run that went far astray, only that it did: no number overflows."""
    return np.asarray(np.exp(np.minimum(loss, 100)))


def _extremes(x: np.ndarray, y: np.ndarray) -> _Points:
    """Thinned to the least and the greatest of each group of neighbours: peaks stay."""
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(x), _POINTS // 2 + 1).astype(int)
    ends = {0, len(x) - 1}
    for first, last in pairwise(edges):
        ends |= {first + y[first:last].argmin(), first + y[first:last].argmax()}
    kept = sorted(ends)
    return x[kept], y[kept]


def _means(x: np.ndarray, y: np.ndarray) -> _Points:
    """Thinned to the means of groups of neighbours."""
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(x), _POINTS + 1).astype(int)
    sizes = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / sizes, np.add.reduceat(y, edges[:-1]) / sizes


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Each point by a straight line fitted to its neighbours, a fiftieth of all to each side.

    Within the run that is their mean. The line keeps the end true, where neighbours are on one
    side only; fewer neighbours at the beginning keep its steep fall.
    """
    x = np.arange(len(y), dtype=np.float64)
    half = np.minimum(x, len(y) // 50)
    first, last = (x - half).astype(int), np.minimum(x + half + 1, len(y)).astype(int)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.append(0.0, np.cumsum(values))
        return np.asarray((sums[last] - sums[first]) / (last - first))

    mean_x, mean_y = mean(x), mean(y)
    spread = np.maximum(mean(x * x) - mean_x**2, 1e-9)  # nothing where a point stands alone
    return np.asarray(mean_y + (mean(x * y) - mean_x * mean_y) / spread * (x - mean_x))


# --- Axes and legends


def _from_zero(axes: "Axes", runs: _Runs, name: str) -> None:
    """The x axis: all steps or tokens of the runs, and a little room."""
    values = [one[name] for history, _ in runs for one in (history.steps, history.evaluations)]
    last = np.nan_to_num(np.concatenate(values)).max(initial=1)
    axes.set_xlim(-0.03 * last, 1.03 * last)
    _count_ticks(axes.xaxis)


def _count_ticks(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: _short(value))


def _plain_numbers(axis: "Axis") -> None:
    """A logarithmic axis with numbers in place of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: _short(value))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """0.5, 20, 1.5k, 2M, 4B: B for a billion, as tokens are counted."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _tokens_above(axes: "Axes", runs: _Runs) -> None:
    """A second axis of tokens seen, if a step is as many in all runs, within a hundredth."""
    progress = [history.progress() for history, _ in runs]
    steps, tokens = max(progress, key=lambda one: float(one[0][-1]))
    last, total = steps[-1], tokens[-1]
    if not total:
        return
    for x, seen in progress:
        if np.abs(np.interp(x, steps, tokens) - seen).max() > total / 100:
            return
    # The axis goes a little beyond what was seen.
    steps = np.concatenate(([-last], steps, [2 * last]))
    tokens = np.concatenate(([-total], tokens, [2 * total]))
    above = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: np.interp(np.asarray(x), steps, tokens),
            lambda x: np.interp(np.asarray(x), tokens, steps),
        ),
    )
    above.set_xlabel("tokens seen")
    _count_ticks(above.xaxis)


def _line_legend(axes: "Axes", *, alone: bool) -> None:
    """What the lines mean, each once; in grey where colours tell the runs apart."""
    from matplotlib.lines import Line2D

    keys: dict[str, Line2D] = {}
    for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
        key = keys.setdefault(str(label), Line2D([], []))
        key.update_from(line)
        if not alone:
            key.set(color=_GREY, marker="")
    if keys:
        axes.legend(list(keys.values()), list(keys), loc="upper right")
