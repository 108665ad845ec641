"""`gptk compare`: samplers side by side on the same prompts."""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import DecodingCommand
from gptk.cli.output import note
from gptk.cli.shared import (
    check_single_process,
    kv_memory_option,
    model_option,
    precision_options,
    progress_bar,
    read_prompt,
    tokenizer_option,
)

if TYPE_CHECKING:
    from gptk.hooks.measuring import Metric
    from gptk.language_model import LanguageModel
    from gptk.measure.comparison import Comparison
    from gptk.model.quantization import Quantize
    from gptk.records.comparing import ComparisonRuns
    from gptk.records.prompts_file import GivenPrompt, PromptsFile
    from gptk.records.writing import Compared

_NOTE_ON_SEEDS = "±: the standard error over the seeds."
_SAMPLE = 160  # characters


@click.command("compare", cls=DecodingCommand)
@click.argument("prompt", required=False)
@click.option(
    "--sampler",
    "samplers",
    metavar="SPEC",
    multiple=True,
    help='For example top-p:0.9, or with processors of its own "top-p:0.9 + '
    'repetition-penalty:1.1". Repeat for each sampler to compare.',
)
@click.option(
    "--processor",
    "processors",
    metavar="SPEC",
    multiple=True,
    help="A logits processor that all samplers get, before their own. Repeat for several; they "
    "work in the order given.",
)
@click.option(
    "--metric",
    "metrics",
    metavar="SPEC",
    multiple=True,
    help="What to measure besides the metrics that are always measured. Repeat for several.",
)
@click.option(
    "--prompts-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Instead of PROMPT: a text on each line, or JSON lines with a prompt or messages, and "
    "settings.",
)
@click.option(
    "--out",
    metavar="RESULTS.jsonl",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a record of each result as soon as it is done. The same command goes on where an "
    "earlier one stopped.",
)
@click.option(
    "--n",
    type=click.IntRange(1, 100_000),
    default=4,
    show_default=True,
    help="Results for each prompt; a sampler that cannot give as many gives the most it can.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="The same for all samplers.")
@click.option(
    "--seeds",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="How many seeds, --seed and those that follow it: figures are then means over the seeds, "
    "with their standard errors.",
)
@model_option
@tokenizer_option
@precision_options
@kv_memory_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object: a record with all results, and all that `gptk repeat` needs.",
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw quality by diversity into a .png, .svg or .pdf file.",
)
@click.option(
    "--csv",
    "table",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the figures of each sampler, prompt and seed into a file, a row for each.",
)
def command(
    prompt: str | None,
    samplers: Sequence[str],
    processors: Sequence[str],
    metrics: Sequence[str],
    prompts_file: str | None,
    out: Path | None,
    model: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str,
    quantize: "Quantize",
    as_json: bool,
    plot: Path | None,
    table: Path | None,
    **settings: Any,
) -> None:
    """Run several samplers on PROMPT and measure what they write.

    Quality is the mean log-probability of the new tokens under the model itself, without
    processors, so that it compares between samplers; diversity is told by distinct:1, distinct:2
    and self-bleu, repetition by seq-rep:4. All are of the model's tokens. Prompts may come from a
    file or standard input, too.
    """
    if not samplers:
        raise click.UsageError("name one sampler or more to compare, --sampler SPEC each")
    with _prompts_file(prompt, prompts_file) as file:
        prompts = _read_prompts(prompt, file)
        warn_of_failures()
        check_single_process("gptk compare")
        from gptk.hooks.sampling import LogitsProcessor
        from gptk.language_model import load
        from gptk.measure.comparison import check_metrics
        from gptk.plugins.creating import create

        # Report mistakes before the model is loaded.
        measures = check_metrics(metrics)
        settings["processors"] = [create("processor", each, LogitsProcessor) for each in processors]
        runs = _runs(prompts, file, samplers, {**settings, "metrics": measures})
        _check_files(plot, table, out)
        loading = partial(
            load, model, device=device, dtype=dtype, quantize=quantize, tokenizer=tokenizer
        )
        if out is None:
            made = _compare(loading(), prompts, samplers, {**settings, "metrics": metrics})
        else:
            from gptk.cli.compare_out import compare_by_file

            made = compare_by_file(out, file, runs, loading, tokenizer=tokenizer)
    if as_json:
        from gptk.records.writing import comparison_record

        asked = {**settings, "metrics": [*measures.values()]}
        click.echo(json.dumps(comparison_record(made, tokenizer=tokenizer, **asked)))
    elif made.comparisons:
        _print(made.comparisons, measures, settings["n"])
    _write_files(made, plot, table)
    _end(made, len(samplers))


def _end(made: "Compared", samplers: int) -> None:
    """Exit with 130 if samplers are missing, with 1 if prompts are."""
    if len(made.comparisons) < samplers:
        done = f"{len(made.comparisons)} of {samplers} samplers compared"
        click.echo(f"interrupted: {done}", err=True)
        sys.exit(130)
    if made.failures:
        sys.exit(1)


def _runs(
    prompts: "Sequence[GivenPrompt]",
    file: "PromptsFile | None",
    samplers: Sequence[str],
    asked: Mapping[str, Any],
) -> "ComparisonRuns":
    """What the command is to run, checked. Raises what is wrong with a sampler or a prompt."""
    from gptk.measure.strategies import check_samplers
    from gptk.records.comparing import ComparisonRuns

    strategies = check_samplers(samplers, asked["n"])
    return ComparisonRuns(
        prompts, strategies, sha256=None if file is None else file.sha256, **asked
    )


def _write_files(made: "Compared", plot: Path | None, table: Path | None) -> None:
    if plot is not None and made.comparisons:
        _plot(made.comparisons, plot)
    if table is not None and made.comparisons:
        _write_csv(made.comparisons, made.prompts, table)


def _prompts_file(
    prompt: str | None, name: str | None
) -> "contextlib.AbstractContextManager[PromptsFile | None]":
    """The file of prompts, if one is named. Raises click.UsageError or DataError."""
    if name is None:
        return contextlib.nullcontext()
    if prompt is not None:
        raise click.UsageError("give PROMPT or --prompts-file, not both")
    from gptk.records.prompts_file import PromptsFile

    return PromptsFile(name)


def _read_prompts(prompt: str | None, file: "PromptsFile | None") -> "list[GivenPrompt]":
    """PROMPT, or the prompts of a file. Raises click.UsageError."""
    from gptk.records.prompts_file import GivenPrompt

    if file is None:
        return [GivenPrompt(prompt=read_prompt(prompt))]
    return list(file.prompts())


def _check_files(plot: Path | None, table: Path | None, out: Path | None) -> None:
    """Raise SourceError, OptionError or click.UsageError for files that cannot be written."""
    from gptk.errors import SourceError
    from gptk.plots.style import check_format

    if plot is not None:
        check_format(plot)
    for option, file in (("--plot", plot), ("--csv", table)):
        if file is not None and not file.parent.is_dir():
            raise SourceError(f"{file} cannot be written: there is no directory {file.parent}")
        if file is not None and out is not None and file.resolve() == out.resolve():
            raise click.UsageError(f"--out and {option} are the same file")


def _compare(
    lm: "LanguageModel",
    prompts: "Sequence[GivenPrompt]",
    samplers: Sequence[str],
    asked: Mapping[str, Any],
) -> "Compared":
    """The comparisons; those of the last samplers are missing if Ctrl-C has ended them."""
    from gptk.measure.comparison import Comparison, compare_one_by_one
    from gptk.records.writing import Compared, used_in

    requests = [given.request() for given in prompts]
    compared: list[Comparison] = []
    with progress_bar("Comparing") as progress, contextlib.suppress(KeyboardInterrupt):
        for comparison in compare_one_by_one(lm, requests, samplers, **asked):
            compared.append(comparison)
            if progress is not None:
                progress(len(compared), len(samplers))
    used = partial(used_in, compared, asked["processors"], lm)
    return Compared(lm, compared, prompts, [], used)


def _plot(compared: "Sequence[Comparison]", plot: Path) -> None:
    from gptk.errors import SourceError
    from gptk.measure.plane import plot_comparison

    try:
        plot_comparison(compared, plot)
    except OSError as error:
        raise SourceError(f"{plot} cannot be written: {error.strerror or error}") from None
    note(f"plot: {plot}")


def _write_csv(
    compared: "Sequence[Comparison]", prompts: "Sequence[GivenPrompt]", table: Path
) -> None:
    import csv

    from gptk.errors import SourceError

    about = ("sampler", "index", "id", "prompt", "seed", "results", "tokens")
    try:
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*about, *compared[0].metrics])
            for comparison in compared:
                for each in comparison.measured:
                    given = prompts[each.prompt]
                    prompt = given.prompt if given.messages is None else given.messages
                    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
                    row = [comparison.sampler, given.index, given.id, text, each.seed]
                    row += [len(each.generations), each.tokens]
                    writer.writerow([*row, *each.metrics.values()])
    except OSError as error:
        raise SourceError(f"{table} cannot be written: {error.strerror or error}") from None
    note(f"table: {table}")


def _print(compared: "Sequence[Comparison]", measures: "Mapping[str, Metric]", n: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gptk.plugins.registry import summary

    table = Table(box=None, pad_edge=False)
    table.add_column("Sampler", overflow="fold")
    for column in ("Results", *measures, "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("Text", overflow="fold", min_width=20)
    for c in compared:
        results = max((len(each.generations) for each in c.measured), default=0)
        sample = " ".join(c.measured[0].generations[0].text.split())
        table.add_row(
            Text(c.sampler),
            str(results) if results == n else f"{results} of {n}",
            *(_number(c.metrics[name], c.standard_errors[name]) for name in measures),
            f"{c.tokens_per_second:.1f}",
            Text(sample if len(sample) <= _SAMPLE else sample[: _SAMPLE - 1] + "…"),
        )
    # As wide as the terminal; in a pipe wide enough for a table.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for c in compared:
        if c.results < n:
            many = "one result" if c.results == 1 else f"at most {c.results} results"
            console.print(Text(f"{c.sampler} has {many} for a prompt."))
    metrics = {metric.name: type(metric) for metric in measures.values()}
    notes = [f"{name}: {summary(kind)}" for name, kind in metrics.items()]
    if any(error is not None for c in compared for error in c.standard_errors.values()):
        notes.append(_NOTE_ON_SEEDS)
    console.print(Text("\n".join(notes), style="dim"))


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
