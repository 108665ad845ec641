"""Comparing decoding strategies: how likely their texts are, how diverse, how repetitive, how fast.

No strategy is best in every respect: strategies that choose likely tokens repeat themselves, and
strategies that sample from the whole distribution become incoherent (Holtzman et al. 2020). So each
is a point in a plane of quality by diversity (Caccia et al. 2020, Zhang et al. 2021). Quality is
measured alike for all strategies:

    mean log-probability = 1/N Σ log p(token | all tokens before it),  p of the model itself

over all N new tokens of all results, without EOS, processors and temperature. The log-probabilities
that samplers themselves report are of a different distribution for each sampler.

The other measures compare sequences of the model's tokens. A measure for which a text is too short
is None.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from gptk.errors import OptionError
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.measure.measures import distinct, mean, self_bleu, seq_rep
from gptk.model.continuations import score_continuations
from gptk.plugins.creating import create
from gptk.spec import split_specs

if TYPE_CHECKING:
    from gptk.decoding.prompts import Prompt
    from gptk.language_model import LanguageModel
    from gptk.model.protocol import CausalModel


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


@dataclass(frozen=True, repr=False)
class Comparison:
    """The results of one sampler, measured."""

    sampler: str
    """The sampler, and processors of its own, as the caller wrote them."""
    random: bool
    """Whether the sampler draws random numbers."""
    results: int
    """Results for each prompt: as many as were asked for, or the most that the sampler can give."""
    generations: list[list[Generation]]
    """The results of each prompt."""
    mean_logprob: float | None
    """Nats a token, under the model itself. None if no result has a token."""
    distinct_1: float | None
    distinct_2: float | None
    """distinct-n of all results of a prompt together, the mean over prompts. It falls with the
    length and number of texts: compare it at equal numbers of results."""
    seq_rep_4: float | None
    """The mean over all results."""
    self_bleu: float | None
    """The mean over prompts with two results or more."""
    tokens: int
    """New tokens in all results."""
    tokens_per_second: float
    strategy: "Strategy | None" = field(default=None, compare=False)
    """The sampler itself, and its processors."""

    @property
    def texts(self) -> list[list[str]]:
        """The texts of the results of each prompt."""
        return [[result.text for result in group] for group in self.generations]

    @property
    def metrics(self) -> dict[str, float | None]:
        """The measures by their names, from `mean_logprob` to `tokens_per_second`."""
        return {name: getattr(self, name) for name in _METRICS}

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it, with the measures in `metrics`."""
        return {
            "sampler": self.sampler,
            "random": self.random,
            "results": self.results,
            "metrics": self.metrics,
            "generations": [[result.to_dict() for result in group] for group in self.generations],
        }

    def __repr__(self) -> str:
        prompts = "1 prompt" if len(self.generations) == 1 else f"{len(self.generations)} prompts"
        results = "1 result" if self.results == 1 else f"{self.results} results"
        known = [
            f"{name} {value:.3f}"
            for name, value in self.metrics.items()
            if value is not None and name != "tokens"
        ]
        return f"Comparison({self.sampler!r}, {prompts}, {results} each, {', '.join(known)})"


_METRICS = (
    *("mean_logprob", "distinct_1", "distinct_2", "seq_rep_4", "self_bleu"),
    *("tokens", "tokens_per_second"),
)


def compare(
    lm: "LanguageModel",
    prompts: "Sequence[Prompt]",
    samplers: Sequence[Compared],
    *,
    processors: Sequence[str | LogitsProcessor] = (),
    n: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Run each sampler on the same prompts with the same seed, and measure the results.

    samplers: each as a spec or an instance. With processors of its own it is a text,
    `"top-p:0.9 + repetition-penalty:1.1"`, or a sequence of the sampler and its processors.
    processors: those of all samplers; they come before a sampler's own.
    n: results for each prompt; a sampler that cannot give as many gives the most that it can.
    progress: called after each sampler with the number of samplers done, and of all.
    Raises what `check_samplers` and `LanguageModel.generate_batch` raise.
    """
    comparisons = compare_one_by_one(
        lm, prompts, samplers, processors=processors, n=n, max_new_tokens=max_new_tokens, seed=seed
    )
    compared = []
    for comparison in comparisons:
        compared.append(comparison)
        if progress is not None:
            progress(len(compared), len(samplers))
    return compared


def compare_one_by_one(
    lm: "LanguageModel",
    prompts: "Sequence[Prompt]",
    samplers: Sequence[Compared],
    *,
    processors: Sequence[str | LogitsProcessor] = (),
    n: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Iterator[Comparison]:
    """As `compare`, each comparison as soon as it is made."""
    strategies = check_samplers(samplers, n)
    if prompts:  # warm up, so that the first sampler is not measured as slower
        lm.generate_batch(prompts[:1], max_new_tokens=1)
    for strategy in strategies:
        start = time.perf_counter()
        best = lm.generate_batch(
            prompts,
            sampler=strategy.sampler,
            processors=[*processors, *strategy.processors],
            n=strategy.results,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        seconds = time.perf_counter() - start
        groups = [[result, *result.alternatives] for result in best]
        yield _measured(strategy, groups, lm.model, seconds)


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


def _measured(
    strategy: Strategy,
    groups: list[list[Generation]],
    model: "CausalModel",
    seconds: float,
) -> Comparison:
    flat = [result for group in groups for result in group]
    tokens = [[result.tokens for result in group] for group in groups]
    scores = score_continuations(model, [(r.prompt_tokens, r.tokens) for r in flat])
    total = sum(len(result.tokens) for result in flat)
    return Comparison(
        sampler=strategy.name,
        random=strategy.sampler.random,
        results=strategy.results,
        generations=[
            [dataclasses.replace(result, alternatives=[]) for result in group] for group in groups
        ],
        mean_logprob=mean(logprob for score in scores for logprob in score.token_logprobs),
        distinct_1=mean(distinct(group, 1) for group in tokens),
        distinct_2=mean(distinct(group, 2) for group in tokens),
        seq_rep_4=mean(seq_rep(result.tokens, 4) for result in flat),
        self_bleu=mean(self_bleu(group) for group in tokens),
        tokens=total,
        tokens_per_second=total / seconds if seconds else 0.0,
        strategy=strategy,
    )
