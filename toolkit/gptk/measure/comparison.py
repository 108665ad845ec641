"""Comparing decoding strategies: how likely their texts are, how diverse, how repetitive, how fast.

No strategy is best in every respect: strategies that choose likely tokens repeat themselves, and
strategies that sample from the whole distribution become incoherent (Holtzman et al. 2020). So each
is a point in a plane of quality by diversity (Caccia et al. 2020, Zhang et al. 2021). What is
measured are plug-ins, see `gptk.Metric`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any

from gptk.engine.scoring import score_continuations
from gptk.errors import counted
from gptk.hooks.base import Plugin
from gptk.hooks.measuring import Metric
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor
from gptk.measure.means import mean, standard_error
from gptk.measure.strategies import (
    Compared,
    Run,
    Strategy,
    check_samplers,
    check_seeds,
    numbered,
    runs_of,
    with_strategy,
)
from gptk.plugins.blame import blaming, expect
from gptk.plugins.creating import create

if TYPE_CHECKING:
    from gptk.decoding.prompts import Prompt
    from gptk.decoding.requests import Request
    from gptk.language_model import LanguageModel
    from gptk.model.protocol import CausalModel


METRICS = ("mean-logprob", "distinct:1", "distinct:2", "seq-rep:4", "self-bleu")
"""What is always measured."""


@dataclass(frozen=True)
class Measured:
    """The results of a sampler for a prompt with a seed, measured."""

    prompt: int
    """The prompt's place among the prompts, from 0."""
    seed: int
    generations: list[Generation]
    metrics: dict[str, float | None]
    """By name, as in `Comparison.metrics`. None where the results are too short or too few."""

    @property
    def tokens(self) -> int:
        """New tokens in all results."""
        return sum(len(result.tokens) for result in self.generations)


@dataclass(frozen=True, repr=False)
class Comparison:
    """The results of one sampler, measured."""

    sampler: str
    """The sampler, and processors of its own, as the caller wrote them."""
    random: bool
    """Whether the sampler draws random numbers."""
    results: int
    """Results for each prompt and seed: as many as were asked for, or the most that the sampler can
    give."""
    measured: list[Measured]
    """For each seed each prompt. A sampler that draws nothing and has no processors has one seed:
    with others its results would be the same."""
    metrics: dict[str, float | None]
    """Each metric by its spec, such as `distinct:1`: the mean over the prompts, weighted as the
    metric says, and of that the mean over the seeds."""
    standard_errors: dict[str, float | None]
    """Of the means over the seeds; None for fewer than two seeds."""
    tokens: int
    """New tokens in all results."""
    tokens_per_second: float
    strategy: "Strategy | None" = field(default=None, compare=False)
    """The sampler itself, and its processors."""
    plugins: tuple[Plugin, ...] = field(default=(), compare=False)
    """The plug-ins that only some of the prompts have."""

    @property
    def texts(self) -> list[list[str]]:
        """The texts of the results of each prompt, with all seeds."""
        texts: dict[int, list[str]] = {}
        for each in self.measured:
            texts.setdefault(each.prompt, []).extend(result.text for result in each.generations)
        return [texts[prompt] for prompt in sorted(texts)]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "sampler": self.sampler,
            "random": self.random,
            "results": self.results,
            "metrics": self.metrics,
            "standard_errors": self.standard_errors,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "measured": [
                {
                    "prompt": each.prompt,
                    "seed": each.seed,
                    "metrics": each.metrics,
                    "generations": [result.to_dict() for result in each.generations],
                }
                for each in self.measured
            ],
        }

    def __repr__(self) -> str:
        count = len({each.prompt for each in self.measured})
        prompts, results = counted(count, "prompt"), counted(self.results, "result")
        known = {**self.metrics, "tokens_per_second": self.tokens_per_second}
        told = [f"{name} {value:.3f}" for name, value in known.items() if value is not None]
        return f"Comparison({self.sampler!r}, {prompts}, {results} each, {', '.join(told)})"


def compare(
    lm: "LanguageModel",
    prompts: "Sequence[Prompt | Request]",
    samplers: Sequence[Compared],
    *,
    processors: Sequence[str | LogitsProcessor] = (),
    n: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
    seeds: int = 1,
    metrics: Sequence[str | Metric] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Run each sampler on the same prompts with the same seeds, and measure the results.

    prompts: each as for `LanguageModel.generate_many`; a request has no sampler, n, seed or
    overflow of its own, and its processors are instead of `processors`.
    samplers: each as a spec or an instance. With processors of its own it is a text,
    `"top-p:0.9 + repetition-penalty:1.1"`, or a sequence of the sampler and its processors.
    processors: those of all samplers; they come before a sampler's own.
    n: results for each prompt; a sampler that cannot give as many gives the most that it can.
    seeds: how many seeds, `seed` and those that follow it; measures are means over them.
    metrics: what is measured besides `METRICS`, as specs or instances.
    progress: called after each sampler with the number of samplers done, and of all.
    Raises what `check_samplers` and `LanguageModel.generate_batch` raise.
    """
    settings: dict[str, Any] = {"n": n, "max_new_tokens": max_new_tokens}
    settings |= {"seed": seed, "seeds": seeds, "processors": processors, "metrics": metrics}
    comparisons = compare_one_by_one(lm, prompts, samplers, **settings)
    compared = []
    for comparison in comparisons:
        compared.append(comparison)
        if progress is not None:
            progress(len(compared), len(samplers))
    return compared


def compare_one_by_one(
    lm: "LanguageModel",
    prompts: "Sequence[Prompt | Request]",
    samplers: Sequence[Compared],
    *,
    processors: Sequence[str | LogitsProcessor] = (),
    n: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
    seeds: int = 1,
    metrics: Sequence[str | Metric] = (),
) -> Iterator[Comparison]:
    """As `compare`, each comparison as soon as it is made."""
    strategies = check_samplers(samplers, n)
    check_seeds(seeds)
    measures = check_metrics(metrics)
    requests, common = numbered(prompts), [*processors]
    if requests:  # warm up, so that the first sampler is not measured as slower
        first = dataclasses.replace(requests[0], settings={})
        lm.generate_batch([first], max_new_tokens=1)
    for strategy in strategies:
        own = [with_strategy(strategy, request.settings) for request in requests]
        runs = runs_of(strategy, own, common, seed, seeds)
        start = time.perf_counter()
        best = lm.generate_batch(
            [dataclasses.replace(requests[run.prompt], settings=run.settings) for run in runs],
            sampler=strategy.sampler,
            processors=[*common, *strategy.processors],
            n=strategy.results,
            max_new_tokens=max_new_tokens,
        )
        seconds = time.perf_counter() - start
        groups = [[result, *result.alternatives] for result in best]
        yield measured_comparison(strategy, runs, groups, lm.model, measures, seconds)


def check_metrics(metrics: Sequence[str | Metric]) -> dict[str, Metric]:
    """The metrics of a comparison by their names, which are their specs as they were written.

    metrics: those besides `METRICS`. Raises what a wrong spec raises.
    """
    named: dict[str, Metric] = {}
    for each in (*METRICS, *metrics):
        metric = create("metric", each, Metric)
        if metric.spec not in {known.spec for known in named.values()}:
            named[each if isinstance(each, str) else each.spec] = metric
    return named


def measured_comparison(
    strategy: Strategy,
    runs: Sequence[Run],
    groups: Sequence[list[Generation]],
    model: "CausalModel",
    metrics: Mapping[str, Metric],
    seconds: float,
) -> Comparison:
    """The results of a sampler, measured.

    groups: the results of each run. seconds: how long all of them took together.
    """
    scores = score_continuations(model, [(r.prompt_tokens, r.tokens) for g in groups for r in g])
    by_seed: dict[int, list[dict[str, _Share]]] = {}
    measured = []
    for run, group in zip(runs, groups, strict=True):
        results = [dataclasses.replace(result, alternatives=[]) for result in group]
        logprobs = [next(scores).token_logprobs for _ in group]
        shares = {name: _share(metric, results, logprobs) for name, metric in metrics.items()}
        by_seed.setdefault(run.seed, []).append(shares)
        values = {name: share.value for name, share in shares.items()}
        measured.append(Measured(run.prompt, run.seed, results, values))
    means = {
        name: [_together(shares[name] for shares in of_seed) for of_seed in by_seed.values()]
        for name in metrics
    }
    tokens = sum(each.tokens for each in measured)
    return Comparison(
        sampler=strategy.name,
        random=strategy.sampler.random,
        results=strategy.results,
        measured=measured,
        metrics={name: mean(values) for name, values in means.items()},
        standard_errors={name: standard_error(values) for name, values in means.items()},
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        strategy=strategy,
        plugins=_plugins_of_prompts(runs),
    )


def _plugins_of_prompts(runs: Iterable[Run]) -> tuple[Plugin, ...]:
    """The plug-ins that prompts name, each once."""
    named = [
        plugin
        for run in runs
        for plugin in (*run.settings.get("processors", ()), run.settings.get("draft"))
    ]
    return tuple({id(plugin): plugin for plugin in named if plugin is not None}.values())


@dataclass(frozen=True)
class _Share:
    """What a metric is for the results of a prompt, and what that weighs among all prompts."""

    value: float | None
    weight: float


def _share(
    metric: Metric, results: list[Generation], logprobs: Sequence[Sequence[float]]
) -> _Share:
    with blaming([metric]):
        value, weight = metric.measure(results, logprobs), metric.weight(results)
    return _Share(_number(metric, "measure", value), _number(metric, "weight", weight) or 0.0)


def _number(metric: Metric, method: str, value: float | None) -> float | None:
    """What a metric returned. Raises PluginError if it is neither a finite number nor None."""
    is_right = isinstance(value, float | int) and math.isfinite(value)
    expect(metric, method, value, float | int if is_right else NoneType, "a finite number or None")
    return value


def _together(shares: Iterable[_Share]) -> float | None:
    """The weighted mean of the values that are not None."""
    known = [(share.value, share.weight) for share in shares if share.value is not None]
    total = math.fsum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / total if total else None
