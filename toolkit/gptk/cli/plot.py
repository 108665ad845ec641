"""`gptk plot`: the losses, perplexity, learning rate and gradient norm of training runs."""

from collections.abc import Sequence
from pathlib import Path

import click

from gptk.cli.command import Command


@click.command("plot", cls=Command)
@click.argument("runs", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A .png, .svg or .pdf file. Default: RUN/losses.png, for several runs losses.png here.",
)
def command(runs: Sequence[Path], out: Path | None) -> None:
    """Plot training runs, several in one figure."""
    from gptk.errors import SourceError
    from gptk.plots.runs import plot_runs

    target = out or (runs[0] / "losses.png" if len(runs) == 1 else Path("losses.png"))
    try:
        plot_runs(runs, target)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from None
    click.echo(str(target))
