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

import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptk.errors import OptionError
from gptk.evaluation import token_logprobs
from gptk.generation import Generation
from gptk.plugins import create
from gptk.sampling import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from gptk.language_model import LanguageModel, Prompt
    from gptk.model import GPT

Text = Sequence[Hashable]
"""A text as its tokens, or words."""


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


# --- Measures ---------------------------------------------------------------------------------


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None; None if all are.

    >>> mean([1.0, None, 2.0])
    1.5
    """
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def distinct(texts: Sequence[Text], n: int) -> float | None:
    """distinct-n: |different n-grams| / |n-grams|, of all texts together; 0 to 1, more is diverse.

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    They divide by the number of words, here as in most later work by that of n-grams,
    so that texts without any repetition have 1. None if there are no n-grams.

    >>> distinct(["abab", "b"], 1)
    0.4
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def seq_rep(text: Text, n: int) -> float | None:
    """seq-rep-n: 1 - |different n-grams| / |n-grams| of one text; 0 to 1, more is repetitive.

    Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training". None if
    there are no n-grams.

    >>> seq_rep("abcabcabc", 3)
    0.5714285714285714
    """
    share = distinct([text], n)
    return None if share is None else 1 - share


def self_bleu(texts: Sequence[Text], n: int = 4) -> float | None:
    """Self-BLEU: the mean BLEU-n of each text, the others its references; 0 to 1, more is alike.

    Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models".
    None for fewer than two texts.

    >>> self_bleu(["abcde", "abcde"])
    1.0
    """
    if len(texts) < 2:
        return None
    return mean(
        bleu(text, [*texts[:number], *texts[number + 1 :]], n) for number, text in enumerate(texts)
    )


def bleu(text: Text, references: Sequence[Text], n: int = 4) -> float:
    """BLEU-n of a text, by uniform weights, 0 to 1:

        BLEU = exp(min(0, 1 - r / c)) · (p_1 · … · p_n)^(1/n)

    p_k: the share of the text's k-grams that are in a reference, each counted at most as often
    as in the one that has it most often; c: the length of the text; r: that of the reference
    nearest in length, of two the shorter. Papineni et al. 2002, "BLEU: a Method for Automatic
    Evaluation of Machine Translation". A share of none is taken for 0.1 matches where at least a
    token matches (Chen and Cherry 2014, smoothing 1, as Texygen has it), and n is at most the
    length of the text, so that equal texts have 1. An empty text has 1 if a reference is empty,
    else 0.

    >>> round(bleu("abcdx", ["abcde"]), 4)
    0.6687
    """
    if not text:
        return float(any(not reference for reference in references))
    order = min(n, len(text))
    logs = []
    for size in range(1, order + 1):
        there = Counter[tuple[Hashable, ...]]()
        for reference in references:
            there |= Counter(_ngrams(reference, size))
        grams = Counter(_ngrams(text, size))
        matches = (grams & there).total()
        if size == 1 and not matches:
            return 0.0
        logs.append(math.log((matches or 0.1) / grams.total()))
    nearest = min(map(len, references), key=lambda length: (abs(length - len(text)), length))
    return math.exp(min(0.0, 1 - nearest / len(text)) + math.fsum(logs) / order)


def _ngrams(text: Text, n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(text[at : at + n]) for at in range(len(text) - n + 1)]


# --- The plane --------------------------------------------------------------------------------


def plot_comparison(compared: Sequence[Comparison], target: Path) -> None:
    """Draw quality by diversity, a point for each sampler, as PNG, SVG or PDF by target's suffix.

    Diversity is 1 - self-BLEU. A sampler that draws nothing and has one result would give it
    again and again: it stands at 0, with a hollow marker. Where self-BLEU is not known for the
    others, as with one result each, diversity is distinct-2 for all. Samplers without a value are
    left out. Raises OptionError for another suffix, OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    from gptk.plotting import COLOURS, MARKERS, check_format, style, write_figure

    check_format(target)
    by_self_bleu, places = _diversity(compared)
    with style():
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        labels = []
        for number, (one, diversity) in enumerate(zip(compared, places, strict=True)):
            if diversity is None or one.mean_logprob is None:
                continue
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(
                [diversity],
                [one.mean_logprob],
                linestyle="None",
                marker=MARKERS[number % len(MARKERS)],
                markersize=7,
                color=colour,
                markerfacecolor="white" if by_self_bleu and one.self_bleu is None else colour,
                clip_on=False,
            )
            labels.append(one.sampler if len(one.sampler) <= 60 else one.sampler[:59] + "…")
        measure = "1 − self-BLEU" if by_self_bleu else "distinct-2"
        axes.set(xlabel=f"diversity ({measure})", ylabel="mean log-probability (nats/token)")
        axes.set_xlim(-0.03, 1.03)
        axes.margins(y=0.15)
        if labels:
            columns = max(1, min(len(labels), 70 // (max(map(len, labels)) + 6)))
            legend = figure.legend(
                axes.get_lines(), [""] * len(labels), loc="outside lower center", ncols=columns
            )
            for text, label in zip(legend.get_texts(), labels, strict=True):
                # Set here, a name may begin with _, and hold $ without becoming a formula.
                text.set_parse_math(False)
                text.set_text(label)
        write_figure(figure, target)


def _diversity(compared: Sequence[Comparison]) -> tuple[bool, list[float | None]]:
    """Whether self-BLEU can tell, and each sampler's place on the diversity axis."""
    if any(one.self_bleu is not None for one in compared):
        places = []
        for one in compared:
            alike = one.self_bleu
            if alike is None and one.results == 1 and not one.random:
                alike = 1.0
            places.append(None if alike is None else 1 - alike)
        if None not in places:
            return True, places
    return False, [one.distinct_2 for one in compared]
