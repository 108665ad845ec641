"""Repeating records: the same results once more, and what differs in them.

Observers are left out: they change nothing, and would write to files. So is the time limit, as
machines differ: a result that it ended is repeated up to the same length.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptk.decoding.prompts import Prompt
from gptk.decoding.requests import Request
from gptk.decoding.settings import check_settings
from gptk.errors import DataError, DecodingError, GptkError
from gptk.hooks.base import Plugin
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor
from gptk.language_model import LanguageModel, load
from gptk.measure.comparison import Comparison, compare
from gptk.measure.strategies import check_samplers
from gptk.plugins.creating import create
from gptk.records.plugin_files import file_differences, files_of, loader_of, plugins_of
from gptk.records.reading import (
    AnyRecord,
    ComparedPrompt,
    ComparisonRecord,
    GenerationRecord,
    Load,
    Record,
    Result,
)
from gptk.records.writing import environment as present_environment
from gptk.records.writing import used_in

_LEFT_OUT = {"observers", "max_seconds"}
_UNFINISHED = ("interrupted", "time")
"""Ends that do not come from the settings alone."""


@dataclass(frozen=True)
class Repetition:
    """A result that was made once more."""

    name: str
    """Which result it is."""
    difference: str | None
    """The first difference; None if they are equal."""
    compared: int
    """The tokens that were compared."""
    largest: float
    """The largest difference between log-probabilities of tokens that are equal."""


Repeated = tuple[list[str], list[Repetition]]
"""A line for each thing that is not what it was, and the results of a record."""


@dataclass
class Models:
    """The model that a record asks for, kept while the records ask for the same."""

    model: str | None = None
    """Instead of the record's, as are the next two."""
    tokenizer: str | None = None
    device: str | None = None
    _loaded: tuple[Load, LanguageModel] | None = field(default=None, repr=False)

    def get(self, wanted: Load) -> LanguageModel:
        """Load the model. Raises what `gptk.load` raises."""
        loaded = self._loaded
        if loaded is None or loaded[0] != wanted or not loaded[1].is_unchanged():
            self._loaded = loaded = None  # so that two are never in memory
            quantize: Any = wanted.quantize
            lm = load(
                self.model or wanted.model,
                device=self.device or wanted.device,
                dtype=wanted.dtype,
                quantize=quantize,
                tokenizer=self.tokenizer or wanted.tokenizer,
            )
            self._loaded = loaded = wanted, lm
        return loaded[1]


def repeat(records: Iterable[AnyRecord], models: Models) -> Iterator[Repeated]:
    """For each record but those of errors its results once more, and before them a line for each
    thing that differs from its environment, its model and the files of its plug-ins.

    Raises what `gptk.load` and `LanguageModel.generate` raise.
    """
    by_environment = itertools.groupby(records, lambda r: (r.load, r.model, r.environment))
    for (how, model, environment), same in by_environment:
        lm = models.get(how)
        lines = differences(environment, model, lm)
        for changed, repetitions in _repeat_all(same, lm):
            yield [*lines, *changed], repetitions


def _repeat_all(records: Iterable[AnyRecord], lm: LanguageModel) -> Iterator[Repeated]:
    for is_generation, same in itertools.groupby(records, _is_generation):
        if is_generation:
            yield from _repeat_generations(same, lm)
        else:
            for record in same:
                if isinstance(record, ComparisonRecord):
                    yield _repeat_comparison(record, lm)


def _is_generation(record: AnyRecord) -> bool:
    return isinstance(record, GenerationRecord)


def differences(environment: dict[str, Any], model: dict[str, Any], lm: LanguageModel) -> list[str]:
    """A line for each thing that differs from a record's environment and model: versions, the
    model's files, dtype, device, …"""
    was, now = _flat("", environment), _flat("", present_environment())
    lines = [
        f"{name}: {now.get(name)}, was {was.get(name)}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    return lines + model_differences(model, lm.to_dict())


def model_differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each thing that differs between two models, as `LanguageModel.to_dict` says what
    they are; the places of their files are not compared."""
    before, after = _flat("model.", was), _flat("model.", now)
    ignored = ("model.source", "model.path", "model.files")
    lines = [
        f"{name}: {after.get(name)}, was {before.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(ignored)
    ]
    hashes = _hashes(was.get("files")), _hashes(now["files"])
    if sorted(hashes[0].values()) != sorted(hashes[1].values()):
        for name in sorted(hashes[0].keys() | hashes[1].keys()):
            then, found = hashes[0].get(name, "none"), hashes[1].get(name, "none")
            if then != found:
                lines.append(f"{name}: SHA-256 {found:.16}, was {then:.16}")
    return lines


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, str]:
    """Values by their paths, such as `tokenizer.sha256`, as text."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(f"{prefix}{name}.", value)
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _hashes(files: Any) -> dict[str, str]:
    """The hash of each file by its name."""
    listed = files if isinstance(files, list) else []
    return {str(f.get("name")): str(f.get("sha256")) for f in listed if isinstance(f, dict)}


@dataclass(frozen=True)
class _Asked:
    """What is asked of the model once more."""

    record: GenerationRecord
    plugins: Sequence[Plugin]


def _repeat_generations(records: Iterable[Any], lm: LanguageModel) -> Iterator[Repeated]:
    requests = (_request(record, lm) for record in records)
    for response in lm.generate_many(requests, ordered=True):
        asked: _Asked = response.request.id
        record, result = asked.record, response.generation
        if response.error is not None:
            result = _unfinished(response.request, lm, response.error)
        assert result is not None
        was, now = [record, *record.alternatives], [result, *result.alternatives]
        compared = list(_compare_all(_name(record), was, now))
        yield _changed(record, asked.plugins, lm), compared


def _name(record: GenerationRecord) -> str:
    run = record.comparison
    if run is None:
        return f"prompt {record.index + 1}"
    return f"{run.sampler}, prompt {run.prompt + 1}, seed {record.settings.seed}"


def _request(record: GenerationRecord, lm: LanguageModel) -> Request:
    prompt: Prompt = "" if record.prompt is None else record.prompt
    if record.messages is not None:
        from gptk.text.chat import encode_chat

        prompt = encode_chat(lm.tokenizer, record.messages, record.template)
    settings = record.settings.model_dump(exclude=_LEFT_OUT)
    results = [record, *record.alternatives]
    if cut := [len(r.tokens) for r in results if r.finish_reason in _UNFINISHED]:
        settings["max_new_tokens"] = max(1, *cut)
    asked = _Asked(record, ())
    with contextlib.suppress(GptkError):  # which is raised when it is this record's turn
        checked = check_settings(**settings)
        settings |= checked.plugins()  # so that they are not made once more
        asked = _Asked(record, plugins_of(checked))
    return Request(prompt, settings=settings, id=asked, ordinal=record.settings.ordinal)


def _changed(record: Record, plugins: Sequence[Plugin], lm: LanguageModel) -> list[str]:
    was = [file.model_dump() for file in record.files]
    return file_differences(was, files_of([*plugins, *loader_of(lm)]))


def _unfinished(request: Request, lm: LanguageModel, error: Exception) -> Generation:
    """The results of a request up to its error, such as a dead end, which were recorded.

    Raises the error if there are none.
    """
    if not isinstance(error, DecodingError):
        raise error
    with lm.stream(request.prompt, **request.settings) as stream:
        try:
            for _ in stream:
                pass
        except DecodingError:
            stream.interrupt()
    return stream.result


def _repeat_comparison(record: ComparisonRecord, lm: LanguageModel) -> Repeated:
    specs = [[compared.spec, *compared.processors] for compared in record.samplers]
    settings = record.settings
    for compared in record.samplers:
        if {was.prompt for was in compared.measured} != {*range(len(record.prompts))}:
            raise DataError(
                f"the record has {len(record.prompts):,} prompts, and results of "
                f"{compared.sampler} for others"
            )
    repetitions: list[Repetition] = []
    processors = [create("processor", spec, LogitsProcessor) for spec in settings.processors]
    again: list[Comparison] = []
    if specs:  # else it was interrupted before the first sampler had ended
        check_samplers(specs, settings.n)
        options = settings.model_dump(exclude={"processors", "metrics"})
        prompts = [_compared_prompt(each) for each in record.prompts]
        again = compare(lm, prompts, specs, processors=processors, **options)
        several = ", seed {}" if settings.seeds > 1 else ""
        for compared, comparison in zip(record.samplers, again, strict=True):
            for was, now in zip(compared.measured, comparison.measured, strict=False):
                name = f"{compared.sampler}, prompt {was.prompt + 1}" + several.format(was.seed)
                repetitions += _compare_all(name, was.generations, now.generations)
    was_read = [file.model_dump() for file in record.files]
    now_read = used_in(again, processors, lm).files
    return file_differences(was_read, now_read), repetitions


def _compared_prompt(given: ComparedPrompt) -> Request:
    prompt: Prompt = "" if given.prompt is None else given.prompt
    settings = {name: value for name, value in given.settings.items() if name not in _LEFT_OUT}
    return Request(prompt, given.messages, settings=settings, ordinal=given.ordinal)


def _compare_all(
    name: str, was: Sequence[Result], now: Sequence[Generation]
) -> Iterator[Repetition]:
    for number, (old, new) in enumerate(zip(was, now, strict=False), 1):
        several = f", result {number}" if len(was) > 1 else ""
        yield compare_results(f"{name}{several}", old, new)
    if len(was) != len(now):
        yield Repetition(name, f"there are {len(now)} results, were {len(was)}", 0, 0.0)


def compare_results(name: str, was: Result, now: Generation) -> Repetition:
    """The first difference between a recorded result and the same result once more.

    Of a result that Ctrl-C or a time limit ended only its tokens are compared.
    """
    if was.prompt_tokens != now.prompt_tokens:
        place = _first(was.prompt_tokens, now.prompt_tokens)
        return Repetition(name, f"the prompt has other tokens from token {place + 1} on", 0, 0.0)
    place = _first(was.tokens, now.tokens)
    known = [
        abs(old - new)
        for old, new in zip(was.token_logprobs[:place], now.token_logprobs[:place], strict=False)
        if old is not None
    ]
    largest = max(known, default=0.0)
    goes_on = was.finish_reason in _UNFINISHED and was.finish_reason != now.finish_reason
    difference = None
    if place < len(was.tokens) or (place < len(now.tokens) and not goes_on):
        told = [_token(r.tokens, r.token_texts, r.token_logprobs, place) for r in (now, was)]
        difference = f"token {place + 1} is {told[0]}, was {told[1]}"
    elif not goes_on and was.finish_reason != now.finish_reason:
        difference = f"the finish reason is {now.finish_reason}, was {was.finish_reason}"
    elif not goes_on and was.text != now.text:
        place = _first(was.text, now.text)
        difference = f"the text differs from character {place + 1} on"
    return Repetition(name, difference, place, largest)


def _first(was: Sequence[object], now: Sequence[object]) -> int:
    """The first place at which two sequences differ, or where the shorter one ends."""
    pairs = enumerate(zip(was, now, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(was), len(now)))


def _token(
    tokens: Sequence[int], texts: Sequence[str], logprobs: Sequence[float | None], place: int
) -> str:
    """A token in words: its text, its id and its log-probability."""
    if place >= len(tokens):
        return "the end"
    text = repr(texts[place]) if place < len(texts) else "?"
    logprob = logprobs[place] if place < len(logprobs) else None
    known = math.nan if logprob is None else logprob
    return f"{text} (id {tokens[place]}, log-probability {known:.6f})"
