"""`gptk plugins`: list the installed plug-ins, show one, or begin a new one."""

import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptk.cli import COMMANDS, warn_of_failures
from gptk.cli.command import Command
from gptk.errors import UnknownNameError, suggest
from gptk.options import option_help
from gptk.plugins.creating import short_form
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import Provided, provided, summary
from gptk.scaffold import SCAFFOLDS, first_command, plugin_name, write_package

# How a plug-in of each kind is used; {} is its spec string.
USES = {
    "sampler": 'gptk generate "Once upon a time" --sampler {}',
    "processor": 'gptk generate "Once upon a time" --sampler multinomial --processor {}',
    "drafter": 'gptk generate "one two three one two" --draft {}',
    "scorer": 'gptk generate "Once upon a time" --sampler best-of-n:scorer={}',
    "metric": 'gptk compare "Once upon a time" --sampler multinomial --metric {}',
    "scheduler": "gptk train --set scheduler={}",
    "regularizer": "gptk train --set regularizers={}",
    "training-observer": "gptk train --set observers={}",
    "decoding-observer": 'gptk generate "Once upon a time" --observer {}',
    "loader": "gptk info {}",
    "writer": "gptk convert smollm2 TARGET --to {}",
    "tokenizer": 'gptk generate "Once upon a time" --tokenizer {}',
    "command": "gptk {} --help",
}


@click.group("plugins", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List all plug-ins: kind, name, distribution."""
    warn_of_failures()
    if ctx.invoked_subcommand:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("Kind", "Name", "Distribution", "What it does"):
        table.add_column(column, overflow="fold")
    for kind in KINDS:
        for plugin in provided(kind).values():
            table.add_row(kind, plugin.name, plugin.distribution, Text(summary(plugin.item)))
    _console().print(table)


@command.command("show", cls=Command)
@click.argument("name")
@click.option(
    "--kind", type=click.Choice(list(KINDS)), help="If several kinds have a plug-in of that name."
)
def show(name: str, kind: str | None) -> None:
    """Show the options of plug-ins called NAME, with bounds, defaults and an example."""
    if name in COMMANDS and kind in (None, "command"):
        click.echo(f"command {name} (gptk): {COMMANDS[name]} See gptk {name} --help")
        return
    searched = [kind] if kind else list(KINDS)
    found = [provided(k)[name] for k in searched if name in provided(k)]
    if not found:
        names = {other for k in searched for other in provided(k)}
        what = KINDS[kind].plural if kind else "plug-ins"
        raise UnknownNameError(
            f"no {kind or 'plug-in'} is called {name!r}; {suggest(name, names, what=what)}"
        )
    for index, plugin in enumerate(found):
        if index:
            click.echo()
        _show(plugin)


@command.command("new", cls=Command)
@click.argument("name")
@click.option("--kind", type=click.Choice(SCAFFOLDS), required=True, help="The kind of plug-in.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder to write. Default: gptk-NAME, also for a NAME that begins with gptk-.",
)
def new(name: str, kind: str, out: Path | None) -> None:
    """Write a package with a plug-in called NAME: working code, tests and packaging.

    The plug-in is a short example of its kind, to be replaced by your own.
    """
    folder = write_package(name, kind, out)
    click.echo(f"{folder}: a package with the {kind} {plugin_name(name)}. Go on with:\n")
    for line in (
        f"cd {shlex.quote(str(folder))}",
        "pip install -e '.[test]'",
        "pytest",
        first_command(kind, name),
    ):
        click.echo(f"  {line}")


def _show(plugin: Provided) -> None:
    console = _console()
    console.print(f"[bold]{plugin.kind} {plugin.name}[/] ({plugin.distribution})", highlight=False)
    item: Any = plugin.item
    if plugin.kind == "command":
        click.echo(summary(item))
    else:
        click.echo(inspect.getdoc(item) or "")
        rows = option_help(item)
        if rows:
            table = Table(box=None, pad_edge=False)
            for column in ("Option", "Allowed", "Default", "What it does"):
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
        else:
            click.echo("No options.")
    if plugin.kind in USES:
        example = getattr(item, "example", "")
        spec = f"{plugin.name}:{example}" if example else plugin.name
        click.echo(f"Example: {USES[plugin.kind].format(shlex.quote(spec))}")
        if plugin.kind != "command" and (short := short_form(item)):
            click.echo(f"{item.positional} may come first without its name: {short}")


def _console() -> Console:
    """As wide as the terminal; if piped, wide enough that no line is folded."""
    return Console(width=None if sys.stdout.isatty() else 1000)
