"""`gptk compare --out`: the results in a file, with which a command that was stopped goes on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptk.cli.many import check_model, decode, open_results, recorded
from gptk.cli.output import note, say
from gptk.cli.progress import Progress
from gptk.errors import counted

if TYPE_CHECKING:
    from gptk.errors import GptkError
    from gptk.hooks.results import Generation
    from gptk.language_model import LanguageModel
    from gptk.records.call import Asked
    from gptk.records.comparing import ComparisonRuns
    from gptk.records.prompts_file import PromptsFile
    from gptk.records.writing import Compared


def compare_by_file(
    out: Path,
    prompts_file: "PromptsFile | None",
    runs: "ComparisonRuns",
    load: "Callable[[], LanguageModel]",
    *,
    tokenizer: str | None,
) -> "Compared":
    """Decode the runs that have no result in a file yet, and compare what is there then.

    load: loads the model. tokenizer: the spec of the one that was given.
    Exits with 130 after Ctrl-C, with 143 after SIGTERM. Raises DataError if the file has results of
    something else.
    """
    from gptk.records.writing import Recorder

    with open_results(out, prompts_file) as results:
        results.read(len(runs), runs.difference)
        lm = load()
        about = None if prompts_file is None else prompts_file.about()
        recorder = Recorder(lm, tokenizer=tokenizer, prompts_file=about)
        check_model(results, recorder)
        if results.done:
            note(f"{results.path} has {counted(results.done, 'result')}; going on")
        progress, clock = Progress(len(runs), "run"), _Clock()
        progress.go_on(results.done, results.failed)

        def write(asked: "Asked", result: "Generation | GptkError") -> "Generation | GptkError":
            seconds = clock.lap()
            line, result = recorded(
                result, lambda each: runs.record(recorder, asked, each, seconds)
            )
            results.write(line)
            return result

        if results.done < len(runs):
            decode(runs.results(lm, results, clock.lap), write, progress, results)
            note(progress.summary())
        compared = runs.compared(results.results(), lm)
    if compared.failures:
        many, of = len(compared.failures), len(compared.failures) + len(compared.prompts)
        say(
            f"{many:,} of {of:,} prompts are left out, as they have failed; the first: "
            f"{compared.failures[0]}"
        )
    return compared


class _Clock:
    """Measures laps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """The seconds since the call before."""
        before, self._start = self._start, time.perf_counter()
        return self._start - before
