"""The records that `gptk generate --json` and `gptk compare --json` write; see docs/records.md."""

import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gptk import __version__, kernels
from gptk.decoding.settings import CheckedSettings
from gptk.hooks.base import Plugin
from gptk.hooks.results import Generation
from gptk.language_model import LanguageModel
from gptk.measure.comparison import Comparison
from gptk.plugins.registry import provided
from gptk.session.rows import equal_before
from gptk.spec import format_spec
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
        **_about(lm, tokenizer, [settings.sampler, *_others(settings)]),
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
    samplers: Sequence[Plugin],
    processors: Sequence[Plugin],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    tokenizer: str | None,
) -> dict[str, Any]:
    """The record of a comparison. samplers: those of `compared`, which may be the first of all."""
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


def _about(lm: LanguageModel, tokenizer: str | None, used: Sequence[Plugin]) -> dict[str, Any]:
    """The model, how to load it, the environment, and the plug-ins' distributions."""
    model = lm.to_dict()
    source = model["source"]
    plugins = [*used, find_loader(source)] if source is not None else used
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
    distributions = dict(found for plugin in plugins for found in _distributions(plugin))
    return {"load": load, "model": model, "environment": environment(), "plugins": distributions}


def _others(settings: CheckedSettings) -> list[Plugin]:
    """The plug-ins of a call besides its sampler."""
    others: list[Plugin] = [*settings.processors, *settings.sampler.processors()]
    others += [] if settings.drafter is None else [settings.drafter]
    return [*others, *settings.observers]


def _distributions(plugin: Plugin) -> Iterator[tuple[str, str]]:
    """For a plug-in, and those that it has made, its kind and name, and its distribution."""
    known = provided(plugin.kind).get(plugin.name)
    is_known = known is not None and known.item is type(plugin)
    yield plugin.title(), known.distribution if known and is_known else type(plugin).__module__
    for value in vars(plugin).values():  # such as the sampler that another wraps
        if isinstance(value, Plugin):
            yield from _distributions(value)
