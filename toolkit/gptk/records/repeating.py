"""Repeating records: the same calls once more, and what differs in their results.

Prompts that were decoded in one call are decoded in one call again, as the last digits of logits
depend on the batch. Observers are left out: they change nothing, and would write to files. So is
the time limit, as machines differ: a result that it ended is repeated up to the same length.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptk.decoding.prompts import Prompt
from gptk.decoding.settings import check_settings
from gptk.decoding.stream import Stream
from gptk.errors import DecodingError
from gptk.hooks.base import Plugin
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor
from gptk.language_model import LanguageModel, load
from gptk.measure.comparison import check_samplers, compare_one_by_one
from gptk.plugins.creating import create
from gptk.records.reading import (
    ComparisonRecord,
    GenerationRecord,
    Load,
    PluginFile,
    Record,
    Result,
)
from gptk.records.writing import environment, files_of, plugins_of

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
                compile=wanted.compile,
                tokenizer=self.tokenizer or wanted.tokenizer,
            )
            self._loaded = loaded = wanted, lm
        return loaded[1]


def repeat(
    records: Sequence[GenerationRecord | ComparisonRecord], models: Models
) -> Iterator[tuple[list[str], list[Repetition]]]:
    """For each call what differs in its environment, and its results once more.

    Raises what `gptk.load` and `LanguageModel.generate_batch` raise.
    """
    for call in calls(records):
        lm = models.get(call[0].load)
        used: list[Plugin] = []
        if isinstance(call[0], ComparisonRecord):
            repetitions = list(_repeat_comparison(call[0], lm, used))
        else:
            repetitions = list(_repeat_generations(call, lm, used))
        differences = environment_differences(call[0], lm)
        differences += file_differences(call[0].files, files_of(lm, used))
        yield differences, repetitions


def calls(records: Sequence[Any]) -> list[list[Any]]:
    """Records grouped by the call that made them: consecutive ones of consecutive prompts."""
    grouped: list[list[Any]] = []
    for record in records:
        last = grouped[-1][-1] if grouped else None
        if (
            isinstance(record, GenerationRecord)
            and isinstance(last, GenerationRecord)
            and record.batch.index == last.batch.index + 1
            and record.batch.size == last.batch.size
            and (record.settings, record.load, record.chat) == (last.settings, last.load, last.chat)
        ):
            grouped[-1].append(record)
        else:
            grouped.append([record])
    return grouped


def environment_differences(record: Record, lm: LanguageModel) -> list[str]:
    """A line for each thing that differs: versions, the model's files, dtype, device, …"""
    model = lm.to_dict()
    was, now = _flat("", record.environment), _flat("", environment())
    was |= _flat("model.", record.model)
    now |= _flat("model.", model)
    ignored = ("model.source", "model.path", "model.files")
    lines = [
        f"{name}: {now.get(name)}, was {was.get(name)}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and not name.startswith(ignored)
    ]
    hashes = _hashes(record.model.get("files")), _hashes(model["files"])
    if sorted(hashes[0].values()) != sorted(hashes[1].values()):
        for name in sorted(hashes[0].keys() | hashes[1].keys()):
            then, found = hashes[0].get(name, "none"), hashes[1].get(name, "none")
            if then != found:
                lines.append(f"{name}: SHA-256 {found:.16}, was {then:.16}")
    return lines


def file_differences(
    recorded: Sequence[PluginFile], found: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A line for each file of a plug-in that is not what it was. found: see `files_of`."""
    was = _numbered((file.plugin, file.name, file.sha256) for file in recorded)
    now = _numbered((file["plugin"], file["name"], file["sha256"]) for file in found)
    return [
        f"{key[1]} of {key[0]}: SHA-256 {now.get(key) or 'none':.16}, "
        f"was {was.get(key) or 'none':.16}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]


def _numbered(
    files: Iterable[tuple[str, str, str | None]],
) -> dict[tuple[str, str, int], str | None]:
    """The hash of each file by its plug-in, its name, and a number for those alike in both."""
    numbered: dict[tuple[str, str, int], str | None] = {}
    for plugin, name, sha256 in files:
        number = sum(key[:2] == (plugin, name) for key in numbered)
        numbered[plugin, name, number] = sha256
    return numbered


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


def _repeat_generations(
    records: Sequence[GenerationRecord], lm: LanguageModel, used: list[Plugin]
) -> Iterator[Repetition]:
    """used: gets the plug-ins of the call."""
    first = records[0]
    settings = first.settings.model_dump(exclude=_LEFT_OUT)
    results = [result for record in records for result in (record, *record.alternatives)]
    if cut := [len(r.tokens) for r in results if r.finish_reason in _UNFINISHED]:
        settings["max_new_tokens"] = max(1, *cut)
    checked = check_settings(**settings)
    used += plugins_of(checked)
    prompts = [_prompt(record, lm) for record in records]
    stream = Stream(
        lm.model,
        lm.tokenizer if checked.stop or lm.has_tokenizer else None,
        [lm.encode(prompt) for prompt in prompts],
        checked,
        ordinals=[record.batch.equal_before for record in records],
    )
    try:
        for _ in stream:
            pass
    except DecodingError:  # such as a dead end, whose results so far were recorded
        stream.interrupt()
    for record, result in zip(records, stream.results, strict=True):
        name = f"prompt {record.batch.index + 1}"
        now = [result, *result.alternatives]
        yield from _compare_all(name, [record, *record.alternatives], now)


def _prompt(record: GenerationRecord, lm: LanguageModel) -> Prompt:
    if record.chat is None:
        return record.prompt
    from gptk.text.chat import conversation, encode_chat

    messages = conversation(record.prompt, record.chat.system)
    return encode_chat(lm.tokenizer, messages, record.chat.template)


def _repeat_comparison(
    record: ComparisonRecord, lm: LanguageModel, used: list[Plugin]
) -> Iterator[Repetition]:
    """used: gets the plug-ins of the call."""
    specs, settings = [compared.spec for compared in record.samplers], record.settings
    processors = [create("processor", spec, LogitsProcessor) for spec in settings.processors]
    used += processors
    if not specs:  # it was interrupted before the first sampler had ended
        return
    check_samplers(specs, settings.n)
    options = settings.model_dump(exclude={"processors"})
    again = compare_one_by_one(lm, record.prompts, specs, processors=processors, **options)
    for compared, comparison in zip(record.samplers, again, strict=True):
        used += [comparison.plugin] if comparison.plugin is not None else []
        groups = zip(compared.generations, comparison.generations, strict=False)
        for number, (was, now) in enumerate(groups, 1):
            yield from _compare_all(f"{compared.sampler}, prompt {number}", was, now)


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
