"""The records that `gptk generate --json` and `gptk compare --json` write; see docs/records.md."""

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from gptk import __version__, kernels
from gptk.decoding.settings import CheckedSettings
from gptk.hooks.base import Plugin
from gptk.hooks.results import Generation
from gptk.language_model import LanguageModel
from gptk.measure.comparison import Comparison
from gptk.plugins.blame import blaming, expect
from gptk.plugins.files import source_file
from gptk.plugins.registry import provided
from gptk.session.rows import equal_before
from gptk.spec import format_spec
from gptk.system.read_files import ReadFile
from gptk.weights.loading import find_loader

VERSION = 1
"""The version of the records' form."""


def generation_records(
    lm: LanguageModel,
    prompts: Sequence[str],
    settings: CheckedSettings,
    results: Sequence[Generation],
    *,
    tokenizer: str | None,
    chat: dict[str, str | None] | None,
) -> list[dict[str, Any]]:
    """A record for each prompt of a call: its result, and all that repeats it.

    prompts: as they were given. tokenizer: the spec of one that was given. chat: the system message
    and the template that were given, if the prompts are messages.
    """
    about = {
        "settings": settings_as_dict(settings),
        **_about(lm, tokenizer, plugins_of(settings), settings.observers),
    }
    ordinals = equal_before([result.prompt_tokens for result in results])
    return [
        {
            "record": "generation",
            "version": VERSION,
            "prompt": prompt,
            "chat": chat,
            "batch": {"index": index, "size": len(results), "equal_before": ordinals[index]},
            **result.to_dict(),
            **about,
        }
        for index, (prompt, result) in enumerate(zip(prompts, results, strict=True))
    ]


def comparison_record(
    lm: LanguageModel,
    prompts: Sequence[str],
    compared: Sequence[Comparison],
    processors: Sequence[Plugin],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    tokenizer: str | None,
) -> dict[str, Any]:
    """The record of a comparison."""
    samplers = [comparison.plugin for comparison in compared if comparison.plugin is not None]
    return {
        "record": "comparison",
        "version": VERSION,
        "prompts": list(prompts),
        "settings": {
            "processors": [full_spec(processor) for processor in processors],
            "n": n,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
        "samplers": [
            {**comparison.to_dict(), "spec": full_spec(sampler)}
            for comparison, sampler in zip(compared, samplers, strict=True)
        ],
        **_about(lm, tokenizer, [*samplers, *processors]),
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
        "max_seconds": settings.max_seconds,
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
    reason = kernels.why_not()
    return {
        "gptk": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": "gptk" if reason is None else f"PyTorch ({reason})",
    }


def plugins_of(settings: CheckedSettings) -> list[Plugin]:
    """The plug-ins of a call on which its results depend."""
    used: list[Plugin] = [settings.sampler, *settings.processors, *settings.sampler.processors()]
    return [*used, *([] if settings.drafter is None else [settings.drafter])]


def files_of(lm: LanguageModel, used: Sequence[Plugin]) -> list[dict[str, Any]]:
    """The files that plug-ins have read, and those that they are written in, each with its
    SHA-256: `plugin` (kind and name), `name`, `bytes`, `sha256`.

    used: the plug-ins of a call, after it; the model's loader is added. Raises PluginError.
    """
    files = []
    for plugin in _all_plugins(lm, used):
        wanted = "a list of gptk.plugins.ReadFile"
        with blaming([plugin]):
            read = list(expect(plugin, "files_read", plugin.files_read(), list | tuple, wanted))
        for file in read:
            expect(plugin, "files_read", file, ReadFile, wanted)
        if (source := source_file(type(plugin))) is not None:
            read.append(source)
        files += [{"plugin": plugin.title(), **file.to_dict()} for file in dict.fromkeys(read)]
    return files


def _about(
    lm: LanguageModel,
    tokenizer: str | None,
    used: Sequence[Plugin],
    observers: Sequence[Plugin] = (),
) -> dict[str, Any]:
    """The model, how to load it, the environment, and the plug-ins' distributions and files."""
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
        "compile": model["compiled"],
    }
    return {
        "load": load,
        "model": model,
        "environment": environment(),
        "plugins": dict(map(_distribution, _all_plugins(lm, [*used, *observers]))),
        "files": files_of(lm, used),
    }


def _all_plugins(lm: LanguageModel, used: Sequence[Plugin]) -> list[Plugin]:
    """The plug-ins of a call, those that they have made, and the model's loader."""
    source = lm.source
    return list(_with_made([*used, find_loader(source)] if source is not None else used))


def _with_made(plugins: Iterable[Plugin]) -> Iterator[Plugin]:
    """Plug-ins, and those that they have made, such as the sampler that another wraps."""
    for plugin in plugins:
        yield plugin
        yield from _with_made(made for made in vars(plugin).values() if isinstance(made, Plugin))


def _distribution(plugin: Plugin) -> tuple[str, str]:
    """A plug-in's kind and name, and its distribution."""
    known = provided(plugin.kind).get(plugin.name)
    is_known = known is not None and known.item is type(plugin)
    return plugin.title(), known.distribution if known and is_known else type(plugin).__module__
