"""A figure of quality by diversity, with a point for each decoding strategy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptk.measure.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.lines import Line2D


def plot_comparison(compared: Sequence[Comparison], target: Path) -> None:
    """Draw quality by diversity, a point for each sampler, as PNG, SVG or PDF by target's suffix.

    Diversity is 1 - self-BLEU. A deterministic sampler with one result would repeat that result:
    its diversity is 0, with a hollow marker, which the legend explains. If self-BLEU is not known
    for the other samplers, as with one result each, diversity is distinct-2 for all. Samplers
    without a value are left out.
    Raises OptionError for another suffix, OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    from gptk.plots.style import (
        COLOURS,
        MARKERS,
        check_format,
        set_literally,
        style,
        write_figure,
    )

    check_format(target)
    by_self_bleu, diversities = _diversity(compared)
    with style():
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        labels = []
        for number, (comparison, diversity) in enumerate(zip(compared, diversities, strict=True)):
            if diversity is None or comparison.metrics["mean-logprob"] is None:
                continue
            colour = COLOURS[number % len(COLOURS)]
            hollow = by_self_bleu and comparison.metrics["self-bleu"] is None
            axes.plot(
                [diversity],
                [comparison.metrics["mean-logprob"]],
                linestyle="None",
                marker=MARKERS[number % len(MARKERS)],
                markersize=7,
                color=colour,
                markerfacecolor="white" if hollow else colour,
                clip_on=False,
            )
            name = comparison.sampler
            labels.append(name if len(name) <= 60 else name[:59] + "…")
        keys = list(axes.get_lines())
        if any(key.get_markerfacecolor() == "white" for key in keys):
            keys.append(_hollow_key())
            labels.append("hollow: always the same result")
        measure = "1 − self-BLEU" if by_self_bleu else "distinct-2"
        axes.set(xlabel=f"diversity ({measure})", ylabel="mean log-probability (nats/token)")
        axes.set_xlim(-0.03, 1.03)
        axes.margins(y=0.15)
        if labels:
            columns = max(1, min(len(labels), 70 // (max(map(len, labels)) + 6)))
            legend = figure.legend(
                keys, [""] * len(labels), loc="outside lower center", ncols=columns
            )
            set_literally(legend, labels)
        write_figure(figure, target)


def _hollow_key() -> "Line2D":
    """What the legend shows beside the words on hollow markers."""
    from matplotlib.lines import Line2D

    from gptk.plots.style import GREY

    return Line2D(
        [], [], linestyle="None", marker="o", markersize=7, color=GREY, markerfacecolor="white"
    )


def _diversity(compared: Sequence[Comparison]) -> tuple[bool, list[float | None]]:
    """Whether diversity is by self-BLEU (else by distinct-2), and that of each sampler."""
    if any(comparison.metrics["self-bleu"] is not None for comparison in compared):
        diversities = []
        for comparison in compared:
            self_bleu = comparison.metrics["self-bleu"]
            if self_bleu is None and comparison.results == 1 and not comparison.random:
                self_bleu = 1.0
            diversities.append(None if self_bleu is None else 1 - self_bleu)
        if None not in diversities:
            return True, diversities
    return False, [comparison.metrics["distinct:2"] for comparison in compared]
