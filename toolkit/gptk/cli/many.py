"""`gptk generate --prompts-file`: the prompts of a file, each by itself, however many there are."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptk.cli.output import note, say
from gptk.cli.progress import Progress
from gptk.cli.shared import print_result
from gptk.errors import GptkError, counted, shown

if TYPE_CHECKING:
    from gptk.hooks.results import Generation
    from gptk.language_model import LanguageModel
    from gptk.records.call import Asked, Call
    from gptk.records.prompts_file import GivenPrompt, PromptsFile
    from gptk.records.results_file import ResultsFile
    from gptk.records.writing import Recorder
    from gptk.training.processes import Processes

_CHECKED_FIRST = 100
"""Prompts that are checked before the model is loaded."""


def generate_many(
    prompts_file: str,
    out: Path | None,
    call: "Call",
    load: "Callable[[], LanguageModel]",
    *,
    as_json: bool,
    tokenizer: str | None,
    seed_given: bool,
) -> None:
    """Decode the prompts of a file; exits with 1 if one has failed, with 130 after Ctrl-C, with 143
    after SIGTERM.

    out: RESULTS.jsonl; without it results are printed in the order of the prompts, as_json as
    records. load: loads the model. tokenizer: the spec of the one that was given.
    """
    from gptk.records.prompts_file import PromptsFile
    from gptk.records.writing import Recorder
    from gptk.training.processes import Processes

    processes = Processes.started()
    if processes.count > 1 and call.checked.sampler.random and not seed_given:
        raise click.UsageError("give --seed, which all processes have to share")
    with PromptsFile(prompts_file) as prompts, contextlib.ExitStack() as stack:
        call.check(prompts.first(_CHECKED_FIRST))
        results = None
        if out is not None:
            out = _of_process(out, processes)
            results = stack.enter_context(open_results(out, prompts))
            _read(results, prompts, call, seed_given=seed_given)
        lm = load()
        recorder = Recorder(
            lm, tokenizer=tokenizer, template=call.template, prompts_file=prompts.about()
        )
        if results is not None:
            check_model(results, recorder)
            if results.done:
                note(f"{results.path} has {counted(results.done, 'result')}; going on")
        write = _writer(call, recorder, results, as_json=as_json)
        progress = Progress(_share(prompts.count, processes))
        if results is not None:
            progress.go_on(results.done, results.failed)
        left = _left(prompts, processes, () if results is None else results)
        ended = call.results(lm, left, ordered=results is None)
        decode(ended, write, progress, results)
    _print_closing_line(call, progress, seed_given=seed_given)
    if progress.errors and processes.count == 1:  # torchrun would end the other processes
        sys.exit(1)


def _of_process(path: Path, processes: "Processes") -> Path:
    """The file for the results of this process: with its rank in the name, if there are several."""
    if processes.count == 1:
        return path
    return path.with_name(f"{path.stem}.{processes.rank}-of-{processes.count}{path.suffix}")


def open_results(path: Path, prompts: "PromptsFile | None") -> "ResultsFile":
    """The file that --out names. prompts: those of --prompts-file.

    Raises click.UsageError or DataError.
    """
    from gptk.records.results_file import ResultsFile

    if prompts is not None and not prompts.is_regular:
        raise click.UsageError(
            f"--out reads the prompts again when it goes on, and {prompts.name} is no file"
        )
    if prompts is not None and path.exists() and os.path.samefile(path, prompts.name):
        raise click.UsageError("--out and --prompts-file are the same file")
    return ResultsFile(path)


def _read(
    results: "ResultsFile", prompts: "PromptsFile", call: "Call", *, seed_given: bool
) -> None:
    """Read which results are there. Raises DataError if they are of another call."""
    seed = results.seed()
    if seed is not None and not seed_given:
        call.use_seed(seed)
    assert prompts.count is not None

    def difference(record: Mapping[str, Any]) -> str | None:
        if record.get("comparison") is not None:
            return "results of gptk compare"
        return call.difference(record, prompts.sha256)

    results.read(prompts.count, difference)


def check_model(results: "ResultsFile", recorder: "Recorder") -> None:
    """Raise DataError if the results are of another model."""
    from gptk.errors import DataError
    from gptk.records.repeating import model_differences

    for model in results.models:
        for line in model_differences(model, recorder.model):
            if not line.startswith("model.device"):  # only last digits depend on it
                raise DataError(
                    f"{results.path} has results of another model ({line}); name another file, or "
                    "remove it"
                )


def _share(count: int | None, processes: "Processes") -> int | None:
    """How many of the prompts are this process's; None if their number is not known."""
    return None if count is None else len(range(processes.rank, count, processes.count))


def _left(
    prompts: "PromptsFile", processes: "Processes", done: "Container[int]"
) -> "Iterator[GivenPrompt]":
    """The prompts of this process that have no result yet."""
    for given in prompts.prompts():
        if given.index % processes.count == processes.rank and given.index not in done:
            yield given


Write = Callable[["Asked", "Generation | GptkError"], "Generation | GptkError"]


def _writer(
    call: "Call", recorder: "Recorder", results: "ResultsFile | None", *, as_json: bool
) -> Write:
    """What writes a result, or prints it; it returns the result, or the error that it became."""

    def write(asked: "Asked", result: "Generation | GptkError") -> "Generation | GptkError":
        if results is not None:
            line, result = recorded(result, lambda each: call.record(recorder, asked, each))
            results.write(line)
        elif as_json:
            line, result = recorded(result, lambda each: call.record(recorder, asked, each))
            click.echo(json.dumps(line))
        elif isinstance(result, GptkError):
            say(str(result))
        else:
            given = asked.given
            shown_as = given.prompt if given.messages is None else given.messages
            title = repr(shown_as) if isinstance(shown_as, str) else shown(shown_as)
            print_result(title, result)
        return result

    return write


def recorded(
    result: "Generation | GptkError", record: "Callable[[Generation | GptkError], dict[str, Any]]"
) -> "tuple[dict[str, Any], Generation | GptkError]":
    """The record of a result, and the result, or the error that it became. record: makes it."""
    try:
        return record(result), result
    except GptkError as error:  # of a plug-in that does not say what it has read
        return record(error), error


def decode(
    ended: "Generator[tuple[Asked, Generation | GptkError], None, None]",
    write: Write,
    progress: Progress,
    results: "ResultsFile | None",
) -> None:
    """Write results as they come, until the last one, Ctrl-C or SIGTERM, which ends the program.

    results: where they are written; None if they are printed.
    """
    from gptk.system.interrupts import Interrupts

    with Interrupts(at_once=True) as interrupts:
        try:
            with progress, contextlib.closing(ended):
                for asked, result in ended:
                    progress.add(write(asked, result))
                    if interrupts.asked:  # and the exception was lost
                        break
                else:
                    return
        except KeyboardInterrupt:
            pass
    line = f"stopped: {progress.done_of_all()} are done"
    if results is not None:
        progress.done = results.done  # also one that was written when the signal came
        line = f"stopped: {progress.done_of_all()} are done; the same command goes on with the rest"
    note(line)
    sys.exit(128 + (interrupts.number or 2))


def _print_closing_line(call: "Call", progress: Progress, *, seed_given: bool) -> None:
    line = progress.summary()
    if call.checked.sampler.random and not seed_given:
        line += f", seed: {call.checked.seed}"
    note(line)
