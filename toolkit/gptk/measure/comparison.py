"""Comparing decoding strategies: how likely their texts are, how diverse, how repetitive, how fast.

No strategy is best at all of it: those that keep to likely tokens repeat themselves, those that
draw freely wander off (Holtzman et al. 2020). So each is a point of a plane, quality by diversity
(Caccia et al. 2020, Zhang et al. 2021). Quality is measured for all in one way, whatever they
chose by:

    mean log-probability = 1/N Σ log p(token | all tokens before it),  p of the model itself

over all N new tokens of all results, EOS left out, without processors or temperature: the
sampler's own log-probabilities would be those of another distribution for each.

The other measures are of sequences of tokens, here the model's. A measure that a text is too
short for is None.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptk.errors import OptionError
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.measure.measures import distinct, mean, self_bleu, seq_rep
from gptk.model.scoring import token_logprobs
from gptk.plugins.creating import create

if TYPE_CHECKING:
    from gptk.language_model import LanguageModel, Prompt
    from gptk.model.gpt import GPT


@dataclass(frozen=True)
class Comparison:
    """What one sampler made of the prompts."""

    sampler: str
    """Its spec string, as it was given."""
    random: bool
    results: int
    """The most for a prompt: as many as were asked for, or as the sampler can give."""
    texts: list[list[str]]
    """The results of each prompt."""
    mean_logprob: float | None
    """Nats a token, see above. None if no result has a token."""
    distinct_1: float | None
    distinct_2: float | None
    """Of all results of a prompt together, the mean over prompts. They fall as texts grow longer
    and more: compare them at equal numbers of results."""
    seq_rep_4: float | None
    """The mean over all results."""
    self_bleu: float | None
    """The mean over prompts with two results or more."""
    tokens: int
    """New tokens, in all."""
    tokens_per_second: float


def compare(
    lm: "LanguageModel",
    prompts: "Sequence[Prompt]",
    samplers: Sequence[str | Sampler],
    *,
    processors: Sequence[str | LogitsProcessor] = (),
    n: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Run each sampler on the same prompts with the same seed, and measure the results.

    n: results for each prompt; of a sampler that cannot give as many, the most that it can.
    progress: called after each sampler with how many are done, and of how many.
    Raises what `check_samplers` and `LanguageModel.generate_batch` raise.
    """
    checked = check_samplers(samplers, n)
    if prompts:  # the first run would pay for warming up
        lm.generate_batch(prompts[:1], max_new_tokens=1)
    compared = []
    for given, (sampler, results) in zip(samplers, checked, strict=True):
        start = time.perf_counter()
        best = lm.generate_batch(
            prompts,
            sampler=sampler,
            processors=processors,
            n=results,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        seconds = time.perf_counter() - start
        groups = [[one, *one.alternatives] for one in best]
        compared.append(_measured(_label(given), sampler, results, groups, lm.model, seconds))
        if progress is not None:
            progress(len(compared), len(samplers))
    return compared


def check_samplers(samplers: Sequence[str | Sampler], n: int) -> list[tuple[Sampler, int]]:
    """Each sampler, and how many results of the n it can give for a prompt.

    Raises OptionError if there is none or if two are equal, and what a wrong spec raises.
    """
    if not samplers:
        raise OptionError("no sampler to compare was given; name one or more")
    if n < 1:
        raise OptionError(f"n is {n}; it must be 1 or more")
    made: dict[str, str] = {}
    checked = []
    for given in samplers:
        sampler = create("sampler", given, Sampler)
        label = _label(given)
        if sampler.spec in made:
            raise OptionError(
                f"two samplers to compare are equal: {made[sampler.spec]} and {label}; "
                "give each once"
            )
        made[sampler.spec] = label
        checked.append((sampler, _most_results(sampler, n)))
    return checked


def _label(sampler: str | Sampler) -> str:
    return sampler if isinstance(sampler, str) else sampler.spec


def _most_results(sampler: Sampler, n: int) -> int:
    for fewer in range(n, 1, -1):
        try:
            sampler.max_rows(fewer)
        except OptionError:
            continue
        return fewer
    sampler.max_rows(1)
    return 1


def _measured(
    label: str,
    sampler: Sampler,
    results: int,
    groups: list[list[Generation]],
    model: "GPT",
    seconds: float,
) -> Comparison:
    everything = [one for group in groups for one in group]
    tokens = [[one.tokens for one in group] for group in groups]
    logprobs = continuation_logprobs(model, [(one.prompt_tokens, one.tokens) for one in everything])
    total = sum(len(one.tokens) for one in everything)
    return Comparison(
        sampler=label,
        random=sampler.random,
        results=results,
        texts=[[one.text for one in group] for group in groups],
        mean_logprob=mean(value for one in logprobs for value in one),
        distinct_1=mean(distinct(group, 1) for group in tokens),
        distinct_2=mean(distinct(group, 2) for group in tokens),
        seq_rep_4=mean(seq_rep(one.tokens, 4) for one in everything),
        self_bleu=mean(self_bleu(group) for group in tokens),
        tokens=total,
        tokens_per_second=total / seconds if seconds else 0.0,
    )


@torch.inference_mode()
def continuation_logprobs(
    model: "GPT", pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """For each (prompt, continuation) the model's log-probability of each continuation token.

    Teacher-forced: one pass over the whole text. Prompt and continuation fit into the window.
    """
    logprobs: list[list[float]] = [[] for _ in pairs]
    # Like lengths go together, so that little is padded; what follows a token does not matter
    # to it, so padding is on the right.
    order = sorted(
        (number for number, (_, new) in enumerate(pairs) if new),
        key=lambda number: sum(map(len, pairs[number])),
    )
    while order:
        longest = sum(map(len, pairs[order[-1]]))
        size = max(1, _BATCH // longest)
        batch, order = order[-size:], order[:-size]
        inputs = torch.zeros(len(batch), longest - 1, dtype=torch.int64)
        for row, number in enumerate(batch):
            prompt, new = pairs[number]
            inputs[row, : len(prompt) + len(new) - 1] = torch.tensor([*prompt, *new][:-1])
        hidden = model(inputs.to(model.device))  # (rows, longest - 1, width)
        for row, number in enumerate(batch):
            prompt, new = pairs[number]
            before = hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(new)]
            targets = torch.tensor(list(new), device=model.device)
            logprobs[number] = token_logprobs(model, before, targets).tolist()
    return logprobs


_BATCH = 4096  # tokens
