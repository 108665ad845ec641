"""Options of the program itself, which every command takes, too: --plugin, --debug and those of
`gptk.cli.output`.
"""

import logging
from collections.abc import Iterable
from typing import Any

import click

from gptk.cli.output import set_level


def add_program_options(command: click.Command) -> click.Command:
    """Give a command, and the commands of a group, the program's options; returns it.

    An option of a plug-in's command that has the same name stays the command's.
    """
    taken = {name for parameter in command.params for name in parameter.opts}
    command.params += [option for option in _OPTIONS if not taken & set(option.opts)]
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            add_program_options(subcommand)
    return command


def register_files(files: Iterable[str]) -> None:
    """Take in the plug-ins in these files."""
    if files:
        from gptk.plugins.files import register_file

        for file in files:
            register_file(file)


_FLAG: dict[str, Any] = {"is_flag": True, "expose_value": False, "is_eager": True}
PLUGIN = click.Option(
    ["--plugin"],
    metavar="FILE.py",
    multiple=True,
    expose_value=False,
    # The group's is called before commands are looked up, which the files may add.
    callback=lambda ctx, param, files: None if ctx.resilient_parsing else register_files(files),
    help="Take in the plug-in in this file, for this one command. Repeatable.",
)
_OPTIONS = (
    click.Option(["--debug"], help="On an error, show the traceback.", **_FLAG),
    PLUGIN,
    click.Option(
        ["-v", "--verbose"],
        callback=lambda ctx, param, given: set_level(given, logging.INFO),
        help="Say what is loaded from where, and how long it takes.",
        **_FLAG,
    ),
    click.Option(
        ["--quiet"],
        callback=lambda ctx, param, given: set_level(given, logging.ERROR),
        help="Say nothing but errors on standard error.",
        **_FLAG,
    ),
)
