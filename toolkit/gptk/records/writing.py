"""The records that `gptk generate --json` and `gptk compare --json` write; see docs/records.md."""

import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptk import __version__, kernels
from gptk.decoding.settings import CheckedSettings
from gptk.errors import GptkError
from gptk.hooks.base import Plugin
from gptk.hooks.results import Generation
from gptk.language_model import LanguageModel
from gptk.measure.comparison import Comparison
from gptk.plugins.registry import provided
from gptk.records.plugin_files import each_once, files_of, loader_of, plugins_of, with_made
from gptk.records.prompts_file import GivenPrompt
from gptk.spec import format_spec
from gptk.text.chat import Message

VERSION = 1
"""The version of the records' form."""


class Recorder:
    """Makes records of the results of a model: of each its result, and all that repeats it.

    tokenizer: the spec of the one that was given instead of the model's. template: the chat
    template that was given. prompts_file: name and SHA-256 of the file that has the prompts.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        tokenizer: str | None = None,
        template: str | None = None,
        prompts_file: Mapping[str, str] | None = None,
    ) -> None:
        self._template, self._prompts_file = template, prompts_file
        self._about = _about(lm, tokenizer)
        self._loader = loader_of(lm)

    @property
    def model(self) -> dict[str, Any]:
        """What the model is, as records have it."""
        model: dict[str, Any] = self._about["model"]
        return model

    def record(
        self,
        given: GivenPrompt,
        messages: Sequence[Message] | None,
        settings: CheckedSettings | None,
        result: Generation | GptkError,
    ) -> dict[str, Any]:
        """The record of a prompt. messages: the conversation that the prompt was made of.

        settings: None if those of the prompt are wrong, which is then its error. Raises PluginError
        or InternalError if a plug-in does not say which files it has read.
        """
        error = result if isinstance(result, GptkError) else None
        plugins = [*([] if settings is None else plugins_of(settings)), *self._loader]
        observers = () if settings is None else settings.observers
        return {
            "record": "generation",
            "version": VERSION,
            "index": given.index,
            "id": given.id,
            "prompt": given.prompt,
            "messages": messages,
            "template": None if messages is None else self._template,
            "error": error and {"kind": type(error).__name__, "message": str(error)},
            **({} if isinstance(result, GptkError) else result.to_dict()),
            "prompts_file": self._prompts_file,
            "comparison": given.comparison,
            "own_settings": given.settings,
            "settings": settings and settings_as_dict(settings),
            **self._about,
            "plugins": _plugins([*plugins, *observers]),
            "files": [] if error else files_of(plugins),
        }


@dataclass(frozen=True)
class Used:
    """The plug-ins of a comparison, as records have them."""

    plugins: Mapping[str, str]
    """Their distributions, by kind and name."""
    files: Sequence[Mapping[str, Any]]
    """The files that they have read, each once."""


def used_in(
    compared: Sequence[Comparison], processors: Sequence[Plugin], lm: LanguageModel
) -> Used:
    """The plug-ins of a comparison that was just made. processors: those of all samplers."""
    strategies = [each.strategy for each in compared if each.strategy is not None]
    plugins: list[Plugin] = [*processors, *loader_of(lm)]
    for each in strategies:
        plugins += [each.sampler, *each.processors, *each.sampler.processors()]
    plugins += [plugin for each in compared for plugin in each.plugins]
    return Used(_plugins(plugins), each_once(files_of(plugins)))


def comparison_settings(
    *,
    processors: Sequence[Plugin],
    n: int,
    max_new_tokens: int,
    seed: int,
    seeds: int,
    metrics: Sequence[Plugin],
) -> dict[str, Any]:
    """The settings of a comparison; plug-ins as specs with all their options."""
    return {
        "processors": [full_spec(processor) for processor in processors],
        "n": n,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "seeds": seeds,
        "metrics": [full_spec(metric) for metric in metrics],
    }


@dataclass(frozen=True)
class Compared:
    """A comparison that was made."""

    lm: LanguageModel
    comparisons: Sequence[Comparison]
    """Of each sampler; if Ctrl-C has come, of those that were done."""
    prompts: Sequence[GivenPrompt]
    """The prompts that were compared. One that has failed with a sampler is left out of all."""
    failures: Sequence[str]
    """For each prompt that was left out the first error."""
    used: Callable[[], Used]
    """Reads files for their hashes. Raises PluginError or InternalError if a plug-in does not say
    which files it has read."""


def comparison_record(
    compared: Compared,
    *,
    tokenizer: str | None,
    metrics: Sequence[Plugin],
    **settings: Any,
) -> dict[str, Any]:
    """The record of a comparison. settings: as for `comparison_settings`."""
    strategies = [each.strategy for each in compared.comparisons if each.strategy is not None]
    used = compared.used()
    return {
        "record": "comparison",
        "version": VERSION,
        "prompts": [
            {
                "index": given.index,
                "id": given.id,
                "prompt": given.prompt,
                "messages": given.messages,
                "settings": given.settings,
                "ordinal": given.ordinal if given.ordinal is not None else given.index,
            }
            for given in compared.prompts
        ],
        "settings": comparison_settings(metrics=metrics, **settings),
        "samplers": [
            {
                **comparison.to_dict(),
                "spec": full_spec(strategy.sampler),
                "processors": [full_spec(processor) for processor in strategy.processors],
            }
            for comparison, strategy in zip(compared.comparisons, strategies, strict=True)
        ],
        **_about(compared.lm, tokenizer),
        "plugins": {**used.plugins, **_plugins(metrics)},
        "files": used.files,
    }


def settings_as_dict(settings: CheckedSettings) -> dict[str, Any]:
    """Every setting in effect; plug-ins as specs with all their options."""
    drafter = settings.drafter
    return {
        "sampler": full_spec(settings.sampler),
        "processors": [full_spec(processor) for processor in settings.processors],
        "max_new_tokens": settings.max_new_tokens,
        "n": settings.n,
        "seed": settings.seed,
        "ordinal": settings.ordinal,
        "stop": list(settings.stop),
        "draft": None if drafter is None else full_spec(drafter),
        "overflow": settings.overflow,
        "max_seconds": None if settings.max_seconds == math.inf else settings.max_seconds,
        "ignore_eos": settings.ignore_eos,
        "use_cache": settings.use_cache,
        "top_logprobs": settings.top_logprobs,
        "observers": [full_spec(observer) for observer in settings.observers],
    }


def full_spec(plugin: Plugin) -> str:
    """The spec string of a plug-in with all its options, those at their default as well."""
    return format_spec(plugin.name, plugin.model_dump(mode="json"))


def environment() -> dict[str, Any]:
    """The versions, and what else results may depend on in their last digits."""
    return {
        "gptk": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.described(),
    }


def _about(lm: LanguageModel, tokenizer: str | None) -> dict[str, Any]:
    """The model, how to load it, and the environment."""
    model = lm.to_dict()
    source = model["source"]
    if source is not None and os.path.exists(source):
        source = os.path.abspath(source)
    load = {
        "model": source,
        "tokenizer": tokenizer,
        "device": model["device"],
        "dtype": model["dtype"],
        "quantize": model["quantize"],
    }
    return {"load": load, "model": model, "environment": environment()}


def _plugins(used: Iterable[Plugin]) -> dict[str, str]:
    """The distributions of plug-ins, by kind and name."""
    return dict(map(_distribution, with_made(used)))


def _distribution(plugin: Plugin) -> tuple[str, str]:
    """A plug-in's kind and name, and its distribution."""
    known = provided(plugin.kind).get(plugin.name)
    is_known = known is not None and known.item is type(plugin)
    return plugin.title(), known.distribution if known and is_known else type(plugin).__module__
