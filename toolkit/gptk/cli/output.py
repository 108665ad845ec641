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

_log = logging.getLogger("gptk")


def quiet() -> bool:
    """Whether --quiet was given: no progress bars, no closing line, no notices."""
    return not _log.isEnabledFor(logging.WARNING)


def note(line: str) -> None:
    """Print a line on standard error, unless --quiet was given."""
    if not quiet():
        click.echo(line, err=True)


def say(message: str) -> None:
    """Print a message on standard error as one line that begins with `gptk:`."""
    click.echo(f"gptk: {' '.join(message.split())}", err=True)


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


def add_output_options(command: click.Command) -> click.Command:
    """Give a command, and the commands of a group, --verbose and --quiet; returns it.

    An option of a plug-in's command that has the same name stays the command's.
    """
    taken = {name for parameter in command.params for name in parameter.opts}
    for option in _options():
        if not taken & set(option.opts):
            command.params.append(option)
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            add_output_options(subcommand)
    return command


def _options() -> list[click.Option]:
    common: dict[str, Any] = {"is_flag": True, "expose_value": False, "is_eager": True}
    return [
        click.Option(
            ["-v", "--verbose"],
            callback=lambda ctx, param, given: _set_level(given, logging.INFO),
            help="Say what is loaded from where, and how long it takes.",
            **common,
        ),
        click.Option(
            ["--quiet"],
            callback=lambda ctx, param, given: _set_level(given, logging.ERROR),
            help="Say nothing but errors on standard error.",
            **common,
        ),
    ]


def _set_level(given: bool, level: int) -> None:
    if not given:
        return
    if _log.level not in (logging.WARNING, level):
        raise click.UsageError("give --verbose or --quiet, not both")
    _log.setLevel(level)
