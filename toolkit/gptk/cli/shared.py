"""Options, arguments and output that several commands share."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import click

from gptk.cli.output import quiet
from gptk.cli.streams import is_text
from gptk.system.kv_memory import kv_memory, read_amount, set_kv_memory

if TYPE_CHECKING:
    from gptk.hooks.results import Generation

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


def _set_kv_memory(ctx: click.Context, _parameter: click.Parameter, size: str | None) -> None:
    """Check it at once, before a model is loaded; the environment variable, too."""
    if ctx.resilient_parsing:
        return
    if size is None:
        kv_memory()
    else:
        read_amount(size, "--kv-memory")
        set_kv_memory(size)


kv_memory_option = click.option(
    "--kv-memory",
    metavar="SIZE",
    expose_value=False,
    callback=_set_kv_memory,
    help="The memory for keys and values of all models: 2GB, 1500MiB, or a share of what is free. "
    "Default: $GPTK_KV_MEMORY, else 25%.",
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


def check_single_process(what: str) -> None:
    """Raise click.UsageError if this is one of several processes: each would do all of the work.

    what: the command.
    """
    from gptk.training.processes import Processes

    count = Processes.started().count
    if count > 1:
        raise click.UsageError(
            f"{what} does not share its work, and by WORLD_SIZE it runs in {count} processes; run "
            "it without torchrun (gptk generate --prompts-file and gptk train share theirs)"
        )


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:05, 2:00:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def print_result(title: str | None, result: "Generation") -> None:
    """Print the texts of a prompt's results, each after a line with the title and its score.

    title: the prompt, for example; None prints a single text alone.
    """
    for number, generation in enumerate((result, *result.alternatives), start=1):
        if title is not None:
            click.echo(f"--- {title} [{number}] score {generation.score:.4f}")
        click.echo(generation.text)


def read_prompt(prompt: str | None) -> str:
    """PROMPT, or standard input if that is piped. Raises click.UsageError."""
    if prompt is None:
        piped = sys.stdin is not None and not sys.stdin.isatty()
        try:
            prompt = sys.stdin.read().removesuffix("\n") if piped else ""
        except UnicodeDecodeError:
            raise click.UsageError("standard input is not UTF-8 text") from None
    if not is_text(prompt):
        raise click.UsageError("PROMPT is not UTF-8 text")
    return prompt
