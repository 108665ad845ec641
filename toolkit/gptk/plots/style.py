"""How all figures look, and how they are written."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gptk.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers can tell apart; the markers are for print
# without colour. Seven and six have no common divisor: 42 runs look different.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP"
_GREY = "#555555"
# A date would make each file another.
_METADATA: Mapping[str, dict[str, None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def write_figure(figure: "Figure", target: Path) -> None:
    """Write a figure so that the file is there whole, the old or the new one. Raises OSError."""
    new = target.with_name(f".{secrets.token_hex(4)}{target.suffix}")
    try:
        figure.savefig(new, dpi=200, metadata=_METADATA[target.suffix.lower()])
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


# --- The figure


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The same look for everybody, whatever a matplotlibrc says; nothing of it stays."""
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
