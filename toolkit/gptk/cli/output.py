"""What the program says on standard error, and how much: --verbose, --quiet.

The library logs (`logging.getLogger("gptk")` and below), and here the program shows each record as
a line that begins with `gptk:`: warnings and errors, with --verbose also what was loaded from
where, with --quiet errors alone.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import click

from gptk.errors import one_line

_log = logging.getLogger("gptk")


def quiet() -> bool:
    """Whether --quiet was given: no progress bars, no closing line, no notices."""
    return not _log.isEnabledFor(logging.WARNING)


def note(line: str) -> None:
    """Print a line on standard error, unless --quiet was given."""
    if not quiet():
        click.echo(line, err=True)


def say(message: str) -> None:
    """Print a message on standard error as one line that begins with `gptk:`.

    Characters that cannot be printed, which arguments and names may have, are escaped.
    """
    click.echo(f"gptk: {one_line(' '.join(message.split()))}", err=True)


def tell(line: str) -> None:
    """Print a line on standard output with names or values of files: what cannot be printed is
    escaped."""
    click.echo(one_line(line))


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within the block, show what gptk logs, and the warnings of plug-ins."""
    handler, level = _Lines(), _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.WARNING)
    show_any = warnings.showwarning

    def show_warning(
        message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any
    ) -> None:
        from gptk.plugins.registry import PluginWarning

        if issubclass(category, PluginWarning):
            logging.getLogger("gptk.plugins").warning(str(message))
        elif not quiet():
            show_any(message, category, *args, **kwargs)

    warnings.showwarning = show_warning
    try:
        yield
    finally:
        warnings.showwarning = show_any
        _log.setLevel(level)
        _log.removeHandler(handler)


class _Lines(logging.Handler):
    """Prints each record as a line."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def set_level(given: bool, level: int) -> None:
    """If an option is given, show what is at least as serious as `level`.

    Raises click.UsageError if another level was set before.
    """
    if not given:
        return
    if _log.level not in (logging.WARNING, level):
        raise click.UsageError("give --verbose or --quiet, not both")
    _log.setLevel(level)
