"""Plots of training runs: losses, perplexity, learning rate and gradient norm, in one figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptk.errors import OptionError
from gptk.plots.curves import extremes, means, perplexity, smoothed, warmup_steps
from gptk.plots.history import History
from gptk.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    check_format,
    set_literally,
    style,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def plot_runs(runs: Sequence[Path], target: Path, *, title: str | None = None) -> None:
    """Draw the metrics of one or more training runs into a PNG, SVG or PDF, by target's suffix.

    Panels: loss in nats a token over steps (and over tokens seen, if steps have equally many tokens
    in all runs), perplexity over tokens seen, learning rate and gradient norm over steps; a panel
    for which nothing was recorded is left out. Losses and norms of single steps are drawn lightly,
    with a smoothed line. In a plot of one run colours tell training from validation; of several
    runs, each has its colour and marker. The same metrics give the same bytes. Raises SourceError
    for a run without metrics, OptionError for another suffix, and OSError if the file cannot be
    written.
    """
    check_format(target)
    if not runs:
        raise OptionError("no training run to plot was given")
    histories = [History.read(run, label) for run, label in zip(runs, _labels(runs), strict=True)]
    looks = _looks(len(histories))
    with style():
        figure = _figure(list(zip(histories, looks, strict=True)))
        if title:
            figure.suptitle(title)
        write_figure(figure, target)


@dataclass(frozen=True)
class _Look:
    """Colours and markers of one run."""

    training: str
    validation: str
    marker: str
    only_run: bool

    @property
    def run_marker(self) -> str | None:
        """Tells the run from the others; None if there is only one run."""
        return None if self.only_run else self.marker


_Runs = Sequence[tuple[History, _Look]]


def _looks(count: int) -> list[_Look]:
    if count == 1:
        return [_Look(COLOURS[0], COLOURS[1], "s", only_run=True)]
    colours = [COLOURS[number % len(COLOURS)] for number in range(count)]
    markers = [MARKERS[number % len(MARKERS)] for number in range(count)]
    return [_Look(c, c, m, only_run=False) for c, m in zip(colours, markers, strict=True)]


def _labels(runs: Sequence[Path]) -> list[str]:
    """The directories' names, with as many parents as are needed to make them differ."""
    paths = [run.resolve() for run in runs]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return labels


def _figure(runs: _Runs) -> "Figure":
    """The panels that have something to draw, with a legend of the runs."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    histories = [history for history, _ in runs]
    panels: list[Callable[[Axes, _Runs], None]] = [_losses]
    if any(len(history.evaluation("tokens", "validation_loss")[0]) for history in histories):
        panels.append(_perplexity)
    if any(len(history.step("lr")[0]) for history in histories):
        panels.append(_learning_rate)
    if any(len(history.step("grad_norm", positive=True)[0]) for history in histories):
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
        labels = [history.label for history in histories]
        columns = max(1, min(len(runs), 110 // (max(map(len, labels)) + 8)))
        legend = figure.legend(keys, [""] * len(keys), loc="outside lower center", ncols=columns)
        set_literally(legend, labels)
    return figure


def _losses(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        x, y = history.step("loss")
        _line(axes, *extremes(x, y), color=look.training, alpha=0.25, linewidth=0.6)
        x, y = means(x, y)
        width = 1.3 if look.only_run else 0.9
        _line(axes, x, smoothed(y), color=look.training, linewidth=width, label="training")
        if look.only_run:  # for more runs the panel would be crowded
            x, y = history.evaluation("step", "train_loss")
            _evaluated(axes, x, y, look, linestyle="None")
        _validation(axes, "step", history, look)
    _from_zero(axes, runs, "step")
    axes.set(xlabel="step", ylabel="loss (nats/token)")
    _tokens_above(axes, runs)
    _line_legend(axes, only_run=len(runs) == 1)


def _perplexity(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        if look.only_run:
            x, y = history.evaluation("tokens", "train_loss")
            _evaluated(axes, x, perplexity(y), look, linestyle="-")
        _validation(axes, "tokens", history, look, perplexity)
    _from_zero(axes, runs, "tokens")
    axes.set(xlabel="tokens seen", ylabel="perplexity", yscale="log")
    _plain_numbers(axes.yaxis)
    _line_legend(axes, only_run=len(runs) == 1)


def _learning_rate(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        x, y = extremes(*history.step("lr"))
        _line(axes, x, y, marker=look.run_marker, color=look.training, linewidth=1.3)
    _from_zero(axes, runs, "step")
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    _show_warmup(axes, runs)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


def _show_warmup(axes: "Axes", runs: _Runs) -> None:
    """Shade the steps of the longest warmup, and write how many they are.

    In a long run they are too few to be seen in the line.
    """
    longest = max(warmup_steps(*history.step("lr")) for history, _ in runs)
    if longest:
        axes.axvspan(0, longest, color=GREY, alpha=0.25, linewidth=0)
        axes.annotate(
            f"warmup: {longest:g} steps",
            (longest, 0),
            (4, 4),
            textcoords="offset points",
            color=GREY,
        )


def _gradient_norm(axes: "Axes", runs: _Runs) -> None:
    for history, look in runs:
        x, y = history.step("grad_norm", positive=True)
        _line(axes, *extremes(x, y), color=look.training, alpha=0.25, linewidth=0.6)
        x, y = means(x, np.log(y))
        y = np.exp(smoothed(y))
        _line(axes, x, y, marker=look.run_marker, color=look.training, linewidth=1.3)
    _from_zero(axes, runs, "step")
    axes.set(xlabel="step", ylabel="gradient norm, before clipping", yscale="log")
    _plain_numbers(axes.yaxis)


def _evaluated(axes: "Axes", x: np.ndarray, y: np.ndarray, look: _Look, *, linestyle: str) -> None:
    line: dict[str, Any] = {"color": look.training, "marker": "o", "markerfacecolor": "white"}
    label = "training, evaluated"
    _line(axes, x, y, label=label, linestyle=linestyle, linewidth=1.3, **line)


def _validation(
    axes: "Axes",
    x: str,
    history: History,
    look: _Look,
    scale: Callable[[np.ndarray], np.ndarray] = np.array,
) -> None:
    line: dict[str, Any] = {"color": look.validation, "marker": look.marker, "linewidth": 1.3}
    xs, ys = history.evaluation(x, "validation_loss")
    _line(axes, xs, scale(ys), label="validation", **line)
    xs, ys = history.evaluation(x, "averaged_validation_loss")
    line |= {"linestyle": "--", "markerfacecolor": "white"}
    _line(axes, xs, scale(ys), label="validation, averaged weights", **line)


# --- Lines


def _line(
    axes: "Axes", x: np.ndarray, y: np.ndarray, *, marker: str | None = None, **style: Any
) -> None:
    """Draw a line, if it has points, with at most 30 markers; a single point always has one."""
    if len(x):
        if len(x) == 1:
            marker = marker or "o"
        every = max(1, len(x) // 15)
        axes.plot(x, y, marker=marker, markersize=3.5, markevery=every, **style)


# --- Axes and legends


def _from_zero(axes: "Axes", runs: _Runs, name: str) -> None:
    """Have the x axis begin at 0, and end a little after the last step or token of all runs."""
    kinds = [kind for history, _ in runs for kind in (history.steps, history.evaluations)]
    last = np.nan_to_num(np.concatenate([kind[name] for kind in kinds])).max(initial=1)
    axes.set_xlim(-0.03 * last, 1.03 * last)
    _count_ticks(axes.xaxis)


def _count_ticks(axis: "Axis") -> None:
    """Label an axis of steps or tokens with round integers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: _short(value))


def _plain_numbers(axis: "Axis") -> None:
    """Label a logarithmic axis with numbers instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: _short(value))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """Such as 0.5, 20, 1.5k, 2M, 4B: B for a billion, as is usual for tokens."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _tokens_above(axes: "Axes", runs: _Runs) -> None:
    """A second axis of tokens seen, if those of a step are equal in all runs, within 1 %."""
    progress = [history.progress() for history, _ in runs]
    steps, tokens = max(progress, key=lambda points: float(points[0][-1]))
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


def _line_legend(axes: "Axes", *, only_run: bool) -> None:
    """What each kind of line means; in grey if colours tell the runs apart."""
    from matplotlib.lines import Line2D

    keys: dict[str, Line2D] = {}
    for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
        key = keys.setdefault(str(label), Line2D([], []))
        key.update_from(line)
        if not only_run:
            key.set(color=GREY, marker="")
    if keys:
        axes.legend(list(keys.values()), list(keys), loc="upper right")
