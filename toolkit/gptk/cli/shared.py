"""Options and a progress bar that several commands share."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import click

from gptk.cli.output import quiet

Command = TypeVar("Command", bound=Callable[..., object])

model_option = click.option(
    "--model",
    metavar="MODEL",
    help="smollm2, a path, a hub id, or a loader spec. Default: $GPTK_MODEL, else SmolLM2 where "
    "installed.",
)
tokenizer_option = click.option(
    "--tokenizer", metavar="SPEC", help="Instead of the model's own: gpt2, bytes, a file, …"
)


def precision_options(command: Command) -> Command:
    """Add --device, --dtype and --quantize."""
    for option in (
        click.option(
            "--quantize",
            type=click.Choice(["auto", "none", "int8", "int4"]),
            default="auto",
            show_default=True,
            help="auto: matrices that a GGUF file has quantized stay so on a CPU; none: all are "
            "expanded; int8, int4: all are rounded.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
        ),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """On a terminal, a progress bar on standard error; elsewhere, and with --quiet, None.

    Call it with how much is done, and of how much.
    """
    if quiet() or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
