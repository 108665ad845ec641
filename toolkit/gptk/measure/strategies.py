"""What is compared: samplers with processors of their own, and the runs of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from gptk.decoding.prompts import Prompt
from gptk.decoding.requests import Request
from gptk.decoding.settings import check_settings
from gptk.errors import OptionError
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.plugins.creating import create
from gptk.spec import split_specs


@dataclass(frozen=True)
class Strategy:
    """A sampler with processors of its own."""

    name: str
    """As the caller wrote it."""
    sampler: Sampler
    processors: tuple[LogitsProcessor, ...]
    results: int
    """Results for each prompt: as many as were asked for, or the most that the sampler can give."""


Compared = str | Sampler | Sequence[str | Sampler | LogitsProcessor]
"""What may be compared: `"top-p:0.9"`, `"top-p:0.9 + repetition-penalty:1.1"`, a sampler, or a
sequence of a sampler and processors, as specs or instances."""


def check_samplers(samplers: Sequence[Compared], n: int) -> list[Strategy]:
    """Each sampler with its processors, and how many results it can give for a prompt, at most n.

    Raises OptionError if there are no samplers or two equal ones, and what a wrong spec raises.
    """
    if not samplers:
        raise OptionError("no sampler to compare was given; name one or more")
    if n < 1:
        raise OptionError(f"n is {n}; it must be 1 or more")
    names: dict[str, str] = {}
    strategies = []
    for compared in samplers:
        strategy = _strategy(compared, n)
        spec = " + ".join(plugin.spec for plugin in (strategy.sampler, *strategy.processors))
        if spec in names:
            raise OptionError(
                f"two samplers to compare are equal: {names[spec]} and {strategy.name}; "
                "give each once"
            )
        names[spec] = strategy.name
        strategies.append(strategy)
    return strategies


def check_seeds(seeds: int) -> None:
    """Raise OptionError for a number of seeds that is not allowed."""
    if not 1 <= seeds <= _MOST_SEEDS:
        raise OptionError(f"seeds is {seeds}; it must be 1 to {_MOST_SEEDS:,}")


def numbered(prompts: Sequence[Prompt | Request]) -> list[Request]:
    """The prompts as requests, each with an ordinal: its place if it has none of its own."""
    requests = [prompt if isinstance(prompt, Request) else Request(prompt) for prompt in prompts]
    return [
        request if request.ordinal is not None else replace(request, ordinal=place)
        for place, request in enumerate(requests)
    ]


@dataclass(frozen=True)
class Run:
    """A prompt that a sampler continues with a seed."""

    prompt: int
    """The prompt's place among the prompts, from 0."""
    seed: int
    settings: dict[str, Any]
    """What differs from the settings of all prompts: the seed, and what the prompt has."""


def runs_of(
    strategy: Strategy,
    own_settings: Sequence[Mapping[str, Any]],
    processors: Sequence[object],
    seed: int,
    seeds: int,
) -> list[Run]:
    """For each seed each prompt; where nothing can draw random numbers, one seed.

    own_settings: those of each prompt, as `with_strategy` has checked them. processors: those of
    all samplers.
    """
    has_processors = bool(processors or strategy.processors)
    has_processors = has_processors or any("processors" in own for own in own_settings)
    may_draw = strategy.sampler.random or has_processors
    return [
        Run(place, seed + number, {**own, "seed": seed + number})
        for number in range(seeds if may_draw else 1)
        for place, own in enumerate(own_settings)
    ]


def check_names(own: Mapping[str, Any]) -> None:
    """Raise OptionError for a setting of a prompt that is the same for all where samplers are
    compared."""
    for name, reason in _NOT_ALLOWED.items():
        if name in own:
            raise OptionError(f"a prompt that is compared cannot have {name}: {reason}")


def with_strategy(strategy: Strategy, own: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's own settings, checked together with a sampler.

    Processors are instead of those of all samplers, and come before the sampler's own.
    Raises OptionError for a setting that a prompt cannot have here, and what wrong ones raise.
    """
    check_names(own)
    if not own:
        return {}
    checked = check_settings(**{**own, "sampler": strategy.sampler, "n": strategy.results})
    made: dict[str, Any] = {"draft": checked.drafter}
    if "processors" in own:
        made["processors"] = [*checked.processors, *strategy.processors]
    return {**own, **{name: made[name] for name in own if name in made}}


_NOT_ALLOWED = {
    "sampler": "samplers are what is compared",
    "n": "it is the same for all prompts",
    "seed": "seeds are the same for all prompts",
    "overflow": "a text is measured within the model's window",
}


def _strategy(compared: Compared, n: int) -> Strategy:
    parts: Sequence[str | Sampler | LogitsProcessor]
    if isinstance(compared, str):
        parts = split_specs(compared)
    else:
        parts = [compared] if isinstance(compared, Sampler) else compared
    first, *rest = parts or [""]
    sampler = create("sampler", cast("str | Sampler", first), Sampler)
    processors = tuple(
        create("processor", cast("str | LogitsProcessor", part), LogitsProcessor) for part in rest
    )
    name = " + ".join(part if isinstance(part, str) else part.spec for part in parts)
    return Strategy(name, sampler, processors, most_results(sampler, n))


def most_results(sampler: Sampler, n: int) -> int:
    """The most results for a prompt that the sampler can give, at most n. Raises OptionError.

    A sampler that can give k results can give fewer.
    """

    def can_give(count: int) -> bool:
        try:
            sampler.max_rows(count)
        except OptionError:
            return False
        return True

    if can_give(n):
        return n
    sampler.max_rows(1)
    fewest, most = 1, n  # it can give `fewest` results, and not `most`
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (middle, most) if can_give(middle) else (fewest, middle)
    return fewest


_MOST_SEEDS = 10_000
"""All results of a sampler are kept in memory."""
