"""A call of many prompts: the settings of each, and how messages become prompts."""

import contextlib
import functools
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from gptk.decoding.prompts import Prompt
from gptk.decoding.requests import Request, Response
from gptk.decoding.settings import CheckedSettings, check_settings
from gptk.errors import GptkError, InternalError, OptionError, PromptError, brief, shown
from gptk.hooks.results import Generation
from gptk.language_model import LanguageModel, Settings
from gptk.records.plugin_files import files_in, files_of, known_differences, plugins_of
from gptk.records.prompts_file import GivenPrompt
from gptk.records.writing import Recorder, settings_as_dict
from gptk.text.chat import Message, conversation, encode_chat


@dataclass(frozen=True)
class PromptSettings:
    """The settings of a prompt, checked, and as its record has them."""

    checked: CheckedSettings
    recorded: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A prompt that was given, and what is asked of the model for it."""

    given: GivenPrompt
    settings: CheckedSettings | None
    """None if they are wrong."""
    messages: Sequence[Message] | None
    """The conversation that the prompt is made of, if any."""


class Call:
    """What all prompts of a call have in common.

    settings: those of `LanguageModel.generate`. chat: prompts are messages of the user, which
    `system` comes before. template: makes prompts of messages, instead of the model's template.
    Raises what `generate` raises for its settings.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        chat: bool = False,
        system: str | None = None,
        template: str | None = None,
    ) -> None:
        self.chat, self.system, self.template = chat, system, template
        self.checked = check_settings(**settings)
        checked = self.checked
        self._settings = {
            **settings,
            "processors": checked.processors,
            "draft": checked.drafter,
            "observers": checked.observers,
            "seed": checked.seed,
        }
        if settings.get("sampler") is not None:  # else the processors of a prompt decide
            self._settings["sampler"] = checked.sampler
        self._prepared = functools.lru_cache(maxsize=_REMEMBERED)(self._prepare)

    def use_seed(self, seed: int) -> None:
        """Take another seed than the one that was given or drawn."""
        self.checked = replace(self.checked, seed=seed)
        self._settings["seed"] = seed
        self._prepared.cache_clear()

    def settings(self) -> Settings:
        """The settings as arguments of `generate_many`."""
        return cast(Settings, dict(self._settings))

    def check(self, prompts: Iterable[GivenPrompt]) -> None:
        """Raise what is wrong with one of the prompts, as far as it can be told without a model."""
        for given in prompts:
            try:
                if given.error is not None:
                    raise given.error
                self.messages(given)
                self.of(given.settings)
            except GptkError as error:
                raise placed(error, given) from None

    def of(self, own_settings: Mapping[str, Any]) -> PromptSettings:
        """The settings of a prompt with settings of its own. Raises what `generate` raises."""
        return self._prepared(json.dumps(own_settings, sort_keys=True))

    def _prepare(self, own_settings: str) -> PromptSettings:
        own = json.loads(own_settings)
        for name, reason in _NOT_ALLOWED.items():
            if name in own:
                raise OptionError(f"a prompt's settings cannot have {name}: {reason}")
        checked = check_settings(**{**self._settings, **own}) if own else self.checked
        return PromptSettings(checked, settings_as_dict(checked))

    def messages(self, given: GivenPrompt) -> Sequence[Message] | None:
        """The conversation that a prompt is made of, if any. Raises PromptError."""
        if given.messages is not None:
            if self.system is not None:
                raise PromptError("--system is for prompts; write it into the messages")
            return given.messages
        if not self.chat:
            return None
        if not isinstance(given.prompt, str) or not given.prompt:
            raise PromptError("--chat needs a message, and the prompt is none")
        return conversation(given.prompt, self.system)

    def asked(self, given: GivenPrompt) -> Asked:
        """What is asked for a prompt. Raises GptkError."""
        return Asked(given, self._numbered(given), self.messages(given))

    def _numbered(self, given: GivenPrompt) -> CheckedSettings:
        """The settings of a prompt, with its ordinal. Raises GptkError."""
        ordinal = self.checked.ordinal + given.index if given.ordinal is None else given.ordinal
        return replace(self.of(given.settings).checked, ordinal=ordinal)

    def request(self, given: GivenPrompt, lm: LanguageModel) -> Request:
        """A prompt as `generate_many` takes it; its id is an Asked. Raises GptkError."""
        if given.error is not None:
            raise given.error
        asked = self.asked(given)
        assert asked.settings is not None
        if asked.messages is not None:
            prompt: Prompt = encode_chat(lm.tokenizer, asked.messages, self.template)
        else:
            prompt = "" if given.prompt is None else given.prompt
        # The plug-ins that were made, so that they are not made once more.
        own = {**given.settings, **asked.settings.plugins()} if given.settings else {}
        return Request(prompt, settings=own, id=asked, ordinal=asked.settings.ordinal)

    def results(
        self, lm: LanguageModel, prompts: Iterable[GivenPrompt], *, ordered: bool
    ) -> Generator[tuple[Asked, Generation | GptkError], None, None]:
        """The result of each prompt, or its error: as they end, or in the order of the prompts."""
        failed: deque[tuple[Asked, GptkError]] = deque()
        left, is_read = iter(prompts), False

        def requests() -> Iterator[Request]:
            nonlocal is_read
            for given in left:
                try:
                    request = self.request(given, lm)
                except GptkError as error:
                    failed.append((self._failed(given), placed(error, given)))
                    if len(failed) >= _MOST_FAILED:
                        return
                else:
                    yield request
            is_read = True

        while not is_read:
            for response in lm.generate_many(requests(), ordered=ordered, **self.settings()):
                asked: Asked = response.request.id
                while failed and not (ordered and failed[0][0].given.index > asked.given.index):
                    yield failed.popleft()
                yield asked, _outcome(response)
            while failed:
                yield failed.popleft()

    def _failed(self, given: GivenPrompt) -> Asked:
        """What is known of a prompt of which nothing can be asked."""
        settings, messages = None, given.messages
        with contextlib.suppress(GptkError):  # then this is the prompt's error
            settings = self._numbered(given)
            messages = self.messages(given)
        return Asked(given, settings, messages)

    def record(
        self, recorder: Recorder, asked: Asked, result: Generation | GptkError
    ) -> dict[str, Any]:
        """The record of a prompt's result. Raises PluginError or InternalError if a plug-in does
        not say which files it has read."""
        return recorder.record(asked.given, asked.messages, asked.settings, result)

    def difference(self, record: Mapping[str, Any], sha256: str | None) -> str | None:
        """What of a record is not as this call would write it, in words; None if nothing is.

        sha256: of the file of prompts, if they are from one.
        """
        was = _object(record, "prompts_file").get("sha256")
        if was != sha256:
            hashes = f"SHA-256 {_beginning(was)}, not {_beginning(sha256)}"
            return f"results for another prompts file ({hashes})"
        try:
            prepared = self.of(_object(record, "own_settings"))
        except GptkError as error:
            return None if record.get("error") else f"settings that cannot be: {error}"
        settings, expected = _object(record, "settings"), prepared.recorded
        for name in sorted(settings.keys() | expected.keys()):
            was, now = settings.get(name), expected.get(name)
            if was != now and name not in ("ordinal", "observers"):
                return f"results of other settings: {name} was {shown(was)} and is {shown(now)}"
        if self._asks_otherwise(record):
            return "results of other --chat, --system or --chat-template"
        return _other_files(record, prepared.checked)

    def _asks_otherwise(self, record: Mapping[str, Any]) -> bool:
        """Whether this call would make another conversation of a record's prompt."""
        prompt, messages = record.get("prompt"), record.get("messages")
        try:
            expected = self.messages(GivenPrompt(prompt=prompt)) if prompt else messages
        except PromptError:  # as in the record
            return False
        return expected != messages or bool(messages and record.get("template") != self.template)


def _other_files(record: Mapping[str, Any], settings: CheckedSettings) -> str | None:
    """Which file of a plug-in is not what it was, in words; None if none is, as far as is known
    before anything is decoded."""
    try:
        found = files_of(plugins_of(settings))
    except GptkError:  # a plug-in may know only after a run
        return None
    lines = known_differences(files_in(record), found)
    return f"results with other files ({lines[0]})" if lines else None


def _object(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _beginning(sha256: object) -> str:
    return "none" if sha256 is None else f"{sha256!s:.8}…"


def _outcome(response: Response) -> Generation | GptkError:
    if (error := response.error) is not None:
        if not isinstance(error, GptkError):  # of gptk's own code, as prompts pass no functions
            error = InternalError(f"internal error: {brief(error)} (this is a fault in gptk)")
        return placed(error, response.request.id.given)
    assert response.generation is not None
    return response.generation


def placed(error: GptkError, given: GivenPrompt) -> GptkError:
    """An error with the line of the prompts file that it is about."""
    with contextlib.suppress(Exception):  # of a plug-in's class that takes other arguments
        return type(error)(f"{given.where}: {error}") if given.where else error
    return GptkError(f"{given.where}: {error}")


_MOST_FAILED = 1000
"""Prompts that failed before they were decoded, of which no more are kept waiting for the results
of those before them."""
_REMEMBERED = 64
"""Prompts with equal settings of their own share the plug-ins that these name."""

_NOT_ALLOWED = {
    "observers": "they may write files, so they are named on the command line alone",
    "ordinal": "it is a field of the line",
}
