"""A comparison as runs, each a prompt with a sampler and a seed, whose results a file has.

The runs are numbered through: for each sampler for each seed each prompt.
"""

import contextlib
import itertools
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptk.errors import DataError, GptkError, shown
from gptk.hooks.measuring import Metric
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor
from gptk.language_model import LanguageModel
from gptk.measure.comparison import measured_comparison
from gptk.measure.strategies import Run, Strategy, check_names, runs_of, with_strategy
from gptk.records.call import Asked, Call, placed
from gptk.records.plugin_files import each_once, files_in
from gptk.records.prompts_file import GivenPrompt
from gptk.records.reading import ErrorRecord, GenerationRecord, checked_record
from gptk.records.writing import Compared, Recorder, Used, comparison_settings, full_spec


@dataclass(frozen=True)
class _OfStrategy:
    """The runs of a sampler."""

    strategy: Strategy
    call: Call
    runs: Sequence[Run]
    given: Sequence[GivenPrompt]
    """Each run as a prompt with settings of its own."""


class ComparisonRuns:
    """The runs of a comparison.

    processors, n, max_new_tokens, seed, seeds: as for `gptk.compare`. sha256: of the file that the
    prompts are from, if they are.

    Raises what is wrong with one of the prompts, as far as it can be told without a model.
    """

    def __init__(
        self,
        prompts: Sequence[GivenPrompt],
        strategies: Sequence[Strategy],
        *,
        processors: Sequence[LogitsProcessor],
        n: int,
        max_new_tokens: int,
        seed: int,
        seeds: int,
        metrics: Mapping[str, Metric],
        sha256: str | None = None,
    ) -> None:
        self._prompts, self._metrics, self._sha256 = prompts, metrics, sha256
        self._settings = {
            "samplers": [
                " + ".join(map(full_spec, (strategy.sampler, *strategy.processors)))
                for strategy in strategies
            ],
            **comparison_settings(
                processors=processors,
                n=n,
                max_new_tokens=max_new_tokens,
                seed=seed,
                seeds=seeds,
                metrics=[*metrics.values()],
            ),
        }
        self._parts: list[_OfStrategy] = []
        numbers = itertools.count()
        for given in prompts:
            with _placing(given):
                check_names(given.settings)
        for strategy in strategies:
            settings = {
                "sampler": strategy.sampler,
                "processors": [*processors, *strategy.processors],
                "n": strategy.results,
                "max_new_tokens": max_new_tokens,
                "seed": seed,
            }
            call = Call(settings)
            call.check(prompts)
            own = []
            for given in prompts:
                with _placing(given):
                    own.append(with_strategy(strategy, given.settings))
            runs = runs_of(strategy, own, processors, seed, seeds)
            numbered = [self._given(strategy, run, next(numbers)) for run in runs]
            self._parts.append(_OfStrategy(strategy, call, runs, numbered))
        self._all = [(part.call, given) for part in self._parts for given in part.given]

    def __len__(self) -> int:
        return len(self._all)

    def _given(self, strategy: Strategy, run: Run, index: int) -> GivenPrompt:
        """A run as a prompt with settings of its own, which JSON can hold."""
        given = self._prompts[run.prompt]
        settings = {**given.settings, "seed": run.seed}
        if "processors" in run.settings:
            settings["processors"] = [full_spec(each) for each in run.settings["processors"]]
        return replace(
            given,
            where=f"{given.where or 'the prompt'} with {strategy.name}",
            index=index,
            settings=settings,
            ordinal=given.index if given.ordinal is None else given.ordinal,
            comparison={
                "sampler": strategy.name,
                "prompt": run.prompt,
                "settings": self._settings,
            },
        )

    def results(
        self, lm: LanguageModel, done: Container[int], begin: Callable[[], object]
    ) -> Generator[tuple[Asked, Generation | GptkError], None, None]:
        """The result of each run, or its error, as they end, one sampler after the other.

        done: the numbers of the runs to leave out. begin: called before a sampler begins.
        """
        is_warm = False
        for part in self._parts:
            left = [given for given in part.given if given.index not in done]
            if not left:
                continue
            if not is_warm:  # so that the first sampler is not measured as slower
                with contextlib.suppress(GptkError):  # which is the error of its run
                    lm.generate_batch([part.call.request(left[0], lm).prompt], max_new_tokens=1)
                is_warm = True
            begin()
            yield from part.call.results(lm, left, ordered=False)

    def record(
        self,
        recorder: Recorder,
        asked: Asked,
        result: Generation | GptkError,
        seconds: float,
    ) -> dict[str, Any]:
        """The record of a run's result. seconds: since the result before it, or since its sampler
        began. Raises what `Call.record` raises."""
        record = self._all[asked.given.index][0].record(recorder, asked, result)
        return {**record, "comparison": {**record["comparison"], "seconds": seconds}}

    def difference(self, record: Mapping[str, Any]) -> str | None:
        """What of a record is not as this comparison would write it, in words; None if nothing
        is."""
        about = record.get("comparison")
        if not isinstance(about, dict):
            return "results of gptk generate"
        settings = about.get("settings")
        was = settings if isinstance(settings, dict) else {}
        for name, now in self._settings.items():
            if was.get(name) != now:
                return f"results of another comparison: {_change(name, was.get(name), now)}"
        index = record.get("index")
        if not isinstance(index, int) or not 0 <= index < len(self):
            return None  # the file of results refuses it
        call, given = self._all[index]
        if (different := call.difference(record, self._sha256)) is not None:
            return different
        for name, now in (("prompt", given.prompt), ("messages", given.messages)):
            if record.get(name) != now:
                return f"results of another comparison: {_change(name, record.get(name), now)}"
        if record.get("own_settings") != given.settings:
            return f"a result of prompt {index + 1:,} with settings of another"
        return None

    def compared(
        self, results: Iterable[tuple[Mapping[str, Any], str]], lm: LanguageModel
    ) -> Compared:
        """Measure the results of all runs.

        results: their records, in any order, each with what it was read from, for messages. Raises
        DataError if a record is damaged, or if no prompt was continued by all samplers.
        """
        read = dict(_read(record, where, lm) for record, where in results)
        failed: dict[int, str] = {}
        for part in self._parts:
            for given, run in zip(part.given, part.runs, strict=True):
                if (error := read[given.index].error) is not None:
                    failed.setdefault(run.prompt, error)
        places = [place for place in range(len(self._prompts)) if place not in failed]
        if not places:
            raise DataError(f"nothing can be compared: {failed[0]}")
        renumbered = {place: number for number, place in enumerate(places)}
        comparisons = []
        for part in self._parts:
            kept = [run for run in part.runs if run.prompt in renumbered]
            found = [
                read[given.index]
                for given, run in zip(part.given, part.runs, strict=True)
                if run.prompt in renumbered
            ]
            comparisons.append(
                measured_comparison(
                    part.strategy,
                    [replace(run, prompt=renumbered[run.prompt]) for run in kept],
                    [result.generations for result in found],
                    lm.model,
                    self._metrics,
                    sum(result.seconds for result in found),
                )
            )
        in_order = [read[index] for index in range(len(self))]
        used = Used(
            {name: whose for result in in_order for name, whose in result.plugins.items()},
            each_once(file for result in in_order for file in result.files),
        )
        kept_prompts = [self._prompts[place] for place in places]
        failures = [failed[place] for place in sorted(failed)]
        return Compared(lm, comparisons, kept_prompts, failures, lambda: used)


@dataclass(frozen=True)
class _Result:
    """What a comparison needs of the record of a run."""

    generations: list[Generation]
    error: str | None
    seconds: float
    plugins: Mapping[str, str]
    files: Sequence[dict[str, Any]]


def _read(raw: Mapping[str, Any], where: str, lm: LanguageModel) -> tuple[int, _Result]:
    """The number of a run and its result. Raises DataError."""
    record = checked_record(raw, where)
    assert isinstance(record, GenerationRecord | ErrorRecord)  # as the file of results has checked
    if record.comparison is None:
        raise DataError(f"{where} is no result of a comparison")
    generations: list[Generation] = []
    error = None
    if isinstance(record, ErrorRecord):
        error = record.error.message
    else:
        generations = record.generations()
        for generation in generations:
            _check_tokens(generation, lm, where)
    return record.index, _Result(
        generations,
        error,
        seconds=record.comparison.seconds,
        plugins=record.plugins,
        files=[dict(file) for file in files_in(raw)],
    )


def _check_tokens(result: Generation, lm: LanguageModel, where: str) -> None:
    """Raise DataError for tokens that the model cannot read."""
    config = lm.model.config
    tokens = [*result.prompt_tokens, *result.tokens]
    if not all(0 <= token < config.vocab_size for token in tokens):
        raise DataError(f"{where} has a token that is not in the model's vocabulary")
    if result.tokens and (not result.prompt_tokens or len(tokens) - 1 > config.context_length):
        raise DataError(
            f"{where} has {len(result.tokens):,} tokens after {len(result.prompt_tokens):,} of a "
            f"prompt; the model's window is {config.context_length:,}"
        )


@contextlib.contextmanager
def _placing(given: GivenPrompt) -> Iterator[None]:
    """Errors in the block name the line of the prompt."""
    try:
        yield
    except GptkError as error:
        raise placed(error, given) from None


def _change(name: str, was: object, now: object) -> str:
    """What was and is something else, in words; of lists the first part that differs."""
    if isinstance(was, list) and isinstance(now, list):
        for place, (old, new) in enumerate(itertools.zip_longest(was, now), 1):
            if old != new:
                told = ["none" if each is None else shown(each, 200) for each in (old, new)]
                return f"{name}: number {place} was {told[0]} and is {told[1]}"
    return f"{name} was {shown(was)} and is {shown(now)}"
