"""The plane of quality by diversity, a point for each strategy."""

from collections.abc import Sequence
from pathlib import Path

from gptk.measure.comparison import Comparison

# --- The plane --------------------------------------------------------------------------------


def plot_comparison(compared: Sequence[Comparison], target: Path) -> None:
    """Draw quality by diversity, a point for each sampler, as PNG, SVG or PDF by target's suffix.

    Diversity is 1 - self-BLEU. A sampler that draws nothing and has one result would give it
    again and again: it stands at 0, with a hollow marker. Where self-BLEU is not known for the
    others, as with one result each, diversity is distinct-2 for all. Samplers without a value are
    left out. Raises OptionError for another suffix, OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    from gptk.plots.style import COLOURS, MARKERS, check_format, style, write_figure

    check_format(target)
    by_self_bleu, places = _diversity(compared)
    with style():
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        labels = []
        for number, (one, diversity) in enumerate(zip(compared, places, strict=True)):
            if diversity is None or one.mean_logprob is None:
                continue
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(
                [diversity],
                [one.mean_logprob],
                linestyle="None",
                marker=MARKERS[number % len(MARKERS)],
                markersize=7,
                color=colour,
                markerfacecolor="white" if by_self_bleu and one.self_bleu is None else colour,
                clip_on=False,
            )
            labels.append(one.sampler if len(one.sampler) <= 60 else one.sampler[:59] + "…")
        measure = "1 − self-BLEU" if by_self_bleu else "distinct-2"
        axes.set(xlabel=f"diversity ({measure})", ylabel="mean log-probability (nats/token)")
        axes.set_xlim(-0.03, 1.03)
        axes.margins(y=0.15)
        if labels:
            columns = max(1, min(len(labels), 70 // (max(map(len, labels)) + 6)))
            legend = figure.legend(
                axes.get_lines(), [""] * len(labels), loc="outside lower center", ncols=columns
            )
            for text, label in zip(legend.get_texts(), labels, strict=True):
                # Set here, a name may begin with _, and hold $ without becoming a formula.
                text.set_parse_math(False)
                text.set_text(label)
        write_figure(figure, target)


def _diversity(compared: Sequence[Comparison]) -> tuple[bool, list[float | None]]:
    """Whether self-BLEU can tell, and each sampler's place on the diversity axis."""
    if any(one.self_bleu is not None for one in compared):
        places = []
        for one in compared:
            alike = one.self_bleu
            if alike is None and one.results == 1 and not one.random:
                alike = 1.0
            places.append(None if alike is None else 1 - alike)
        if None not in places:
            return True, places
    return False, [one.distinct_2 for one in compared]
