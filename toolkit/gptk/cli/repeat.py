"""`gptk repeat`: make recorded results once more, and say what differs."""

import sys
from pathlib import Path

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import Command
from gptk.cli.output import tell
from gptk.cli.shared import check_single_process, model_option, tokenizer_option


@click.command("repeat", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@tokenizer_option
@click.option("--device", help="Instead of the recorded device: auto, cpu, cuda, cuda:1, mps.")
def command(file: Path, model: str | None, tokenizer: str | None, device: str | None) -> None:
    """Repeat the runs recorded in FILE, which `generate --json` or `compare --json` wrote.

    For each result it says that it is equal, or the first token at which it differs; and what
    differs in the environment, such as a version or the SHA-256 of the model. --model and
    --tokenizer are for files that are in another place now. Exits with 0 if all results are equal,
    with 1 if not.
    """
    warn_of_failures()
    check_single_process("gptk repeat")
    from gptk.records.reading import read_records
    from gptk.records.repeating import Models, repeat

    records = read_records(file)
    told: set[str] = set()
    equal = total = 0
    for differences, repetitions in repeat(records, Models(model, tokenizer, device)):
        for line in differences:
            if line not in told:
                tell(f"environment: {line}")
                told.add(line)
        for repetition in repetitions:
            total += 1
            equal += repetition.difference is None
            state = (
                "equal" if repetition.difference is None else f"DIFFERENT: {repetition.difference}"
            )
            tell(
                f"{repetition.name}: {state}; {repetition.compared} equal tokens, "
                f"log-probabilities within {repetition.largest:.2g}"
            )
    click.echo(f"{equal} of {total} results are equal")
    if equal < total:
        sys.exit(1)
