"""The `gptk` program: each command is a file, imported when the command is run.

`gptk --help` imports neither torch nor plug-ins; commands that plug-ins add are looked up when
a name is not one of gptk's own.
"""

import gc
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn

import click

from gptk import __version__
from gptk.cli.output import say, shown
from gptk.cli.program_options import add_program_options
from gptk.cli.streams import discard_output, explain, prepare_streams, text_arguments
from gptk.errors import GptkError, PluginError, UnknownNameError, suggest
from gptk.system import interrupts

# Name -> its line in `gptk --help`. The command is gptk.cli.NAME.command.
COMMANDS = {
    "compare": "Compare samplers on the same prompts: quality, diversity, speed.",
    "convert": "Write a model in another format.",
    "eval": "Measure how well a model predicts a text.",
    "generate": "Continue a prompt, by any sampler.",
    "info": "Show what a model is made of.",
    "plot": "Plot the losses of training runs.",
    "plugins": "List plug-ins, show one with its options, or begin a new one.",
    "repeat": "Repeat recorded runs, and say what differs.",
    "tokenize": "Show the tokens of a text, or the text of tokens.",
    "train": "Train a model, or go on training one.",
}


_log = logging.getLogger(__name__)


class _Commands(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        with shown():
            return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name in COMMANDS:
            command = importlib.import_module(f"gptk.cli.{name}").command
        else:
            from gptk.plugins.registry import find, provided, reserve_commands

            reserve_commands(COMMANDS)
            added = provided("command")
            if name not in added:
                known = suggest(name, [*COMMANDS, *added], what="commands")
                raise UnknownNameError(f"no command is called {name!r}; {known}")
            command = find("command", name).item
        assert isinstance(command, click.Command)
        return add_program_options(command)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (GptkError, click.ClickException, click.exceptions.Exit, click.Abort, OSError):
            raise
        except Exception as error:
            name = ctx.invoked_subcommand
            if name is None or name in COMMANDS:
                raise
            from gptk.errors import brief
            from gptk.plugins.registry import find

            whose = find("command", name).distribution
            raise PluginError(f"command {name} of {whose} failed: {brief(error)}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))
        formatter.write_text("Plug-ins may add commands: `gptk plugins` lists them.")


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="gptk %(version)s")
def cli() -> None:
    """Decoding strategies for GPT models: every sampler with every processor, exactly."""


add_program_options(cli)


def main() -> NoReturn:
    """Run the program.

    Exits with 0; with 1 for an error, a fault in gptk itself included; with 2 for a wrong command
    line; with 130 for Ctrl-C, and 143 for SIGTERM where a command goes on after it.
    """
    interrupts.remember()
    try:
        prepare_streams()
        ended = cli.main(text_arguments(sys.argv[1:]), prog_name="gptk", standalone_mode=False)
        code = ended if isinstance(ended, int) else 0
        sys.stdout.flush()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # torch's communication threads may outlive the interpreter, and then abort the
            # process; torchrun would take that for a failure of a run that has ended well.
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    except BrokenPipeError:
        # The reader has gone, as in `gptk … | head -1`: nothing is left to say.
        discard_output()
        sys.exit(0)
    except (KeyboardInterrupt, click.Abort) as error:
        interrupt = error.__cause__ or error  # click makes Abort of a KeyboardInterrupt
        sys.exit(getattr(interrupt, "exit_code", 130))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if (number := interrupts.raised()) and not isinstance(error, OSError):
            sys.exit(128 + number)  # a library has made this error of KeyboardInterrupt
        if "--debug" in sys.argv and not isinstance(error, click.ClickException):
            traceback.print_exc()
        message, code = explain(error)
        _fail(message, code)
    finally:
        # At exit Python collects garbage, which takes 0.3 s with all of PyTorch's objects.
        gc.freeze()


def _fail(message: str, code: int) -> NoReturn:
    say(message)
    sys.exit(code)


def warn_of_failures(kinds: Iterable[str] | None = None) -> None:
    """Log a warning for each plug-in that could not be loaded.

    kinds: those that a command uses; the hooks of others are then not called, which saves time.
    """
    from gptk.plugins.kinds import KINDS
    from gptk.plugins.registry import failures, reserve_commands
    from gptk.system import collector

    reserve_commands(COMMANDS)
    with collector.paused(), interrupts.exiting():  # this is where PyTorch is imported
        for line in failures(KINDS if kinds is None else kinds):
            _log.warning("skipped %s", line)
