"""How all figures look, and how they are written."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptk.errors import OptionError
from gptk.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend


FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers can tell apart; markers are for print without
# colour. Seven and six have no common divisor, so the first 42 pairs differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP"
GREY = "#555555"
"""For lines that mean the same in all colours."""
# Without dates, so that the same figure is written as the same bytes.
_METADATA: Mapping[str, dict[str, None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def write_figure(figure: "Figure", target: Path) -> None:
    """Write a figure; the old file stays until the new one is complete. Raises OSError."""
    suffix = target.suffix.lower()
    with replacing(target) as file:
        figure.savefig(file, format=suffix[1:], dpi=200, metadata=_METADATA[suffix])


def check_format(target: Path) -> None:
    """Raise OptionError unless the suffix names one of FORMATS."""
    if target.suffix.lower() not in FORMATS:
        raise OptionError(
            f"{target} has the suffix {target.suffix!r}; allowed: {', '.join(FORMATS)}"
        )


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The same style on every machine, whatever its matplotlibrc says; the old one is restored."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "gptk",
                "pdf.fonttype": 42,  # fonts as many journals ask for them
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.color": "#e4e4e4",
                "grid.linewidth": 0.6,
                "axes.axisbelow": True,
                "axes.formatter.use_mathtext": True,
                "legend.frameon": False,
            }
        )
        yield


def set_literally(legend: "Legend", labels: Sequence[str]) -> None:
    """Set the texts of a legend literally: a label may begin with _, and $ begins no formula."""
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
