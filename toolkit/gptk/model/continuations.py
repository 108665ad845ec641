"""The log-probabilities of many continuations under a model, each given its context.

Pairs of similar lengths are read in one pass, with padding on the right, which causal attention
does not see. A context that has several continuations, as the question of a multiple choice has, is
read once: its keys and values are shared by the continuations, which are read in a second pass.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptk.errors import counted
from gptk.model.protocol import CausalModel, evaluating
from gptk.model.scoring import CHUNK, final_states

Pair = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context, at least one, and of its continuation."""


@dataclass(frozen=True, repr=False)
class ContinuationScore:
    """How probable a continuation is under a model, given its context."""

    tokens: list[int]
    """The continuation."""
    token_logprobs: list[float]
    """The log-probability of each of `tokens`, given the context and the tokens before, in nats."""
    is_greedy: bool
    """Whether each of `tokens` is the most probable one, so that greedy search would write them."""

    @property
    def logprob(self) -> float:
        """The log-probability of the whole continuation, in nats."""
        return math.fsum(self.token_logprobs)

    def __repr__(self) -> str:
        greedy = ", greedy" if self.is_greedy else ""
        tokens = counted(len(self.tokens), "token")
        return f"ContinuationScore({tokens}, logprob {self.logprob:.4f}{greedy})"


def score_continuations(model: CausalModel, pairs: Iterable[Pair]) -> Iterator[ContinuationScore]:
    """The score of each continuation, in the order of the pairs.

    Context and continuation without its last token must fit into the model's window together. The
    pairs are read as scores are asked for, some 65,000 tokens ahead.
    """
    ahead: list[Pair] = []
    tokens = 0
    for pair in pairs:
        ahead.append(pair)
        tokens += sum(map(len, pair))
        if tokens >= _AHEAD:
            yield from _scored(model, ahead)
            ahead, tokens = [], 0
    yield from _scored(model, ahead)


@dataclass(frozen=True)
class _Group:
    """A context, and the pairs that have it."""

    context: Sequence[int]
    numbers: list[int]
    """The numbers of the pairs, those with the shortest continuations first."""
    continuations: list[Sequence[int]]

    @property
    def longest(self) -> int:
        """The length of the longest continuation."""
        return len(self.continuations[-1])

    @property
    def length(self) -> int:
        """How many tokens must be read for the longest continuation: its last is only predicted."""
        return len(self.context) + self.longest - 1


def _scored(model: CausalModel, pairs: Sequence[Pair]) -> list[ContinuationScore]:
    scores = {n: ContinuationScore([], [], True) for n, (_, new) in enumerate(pairs) if not new}
    alone, shared = _grouped(pairs)
    for batch in _batches(alone, _fit_alone):
        scores |= _read_alone(model, batch)
    for batch in _batches(shared, lambda groups: _fit_shared(groups, model.config.context_length)):
        scores |= _read_shared(model, batch)
    return [scores[number] for number in range(len(pairs))]


def _grouped(pairs: Sequence[Pair]) -> tuple[list[_Group], list[_Group]]:
    """The pairs to read alone, and those whose context is worth sharing.

    Two passes cost more than one, so that sharing must spare a quarter of the tokens.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, new) in enumerate(pairs):
        if new:
            by_context.setdefault(tuple(context), []).append(number)
    alone: list[_Group] = []
    shared: list[_Group] = []
    for context, numbers in by_context.items():
        numbers.sort(key=lambda number: len(pairs[number][1]))
        lengths = [len(pairs[number][1]) for number in numbers]
        spared = len(context) * (len(numbers) - 1)
        is_shared = 4 * spared >= len(context) * len(numbers) + sum(lengths)
        size = max(1, BATCH // lengths[-1]) if is_shared else 1
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            group = _Group(context, part, [pairs[number][1] for number in part])
            (shared if is_shared else alone).append(group)
    return alone, shared


def _batches(
    groups: list[_Group], fit: Callable[[Sequence[_Group]], bool]
) -> Iterator[list[_Group]]:
    """Groups of similar lengths together, the longest first, as many as fit into one pass."""
    batch: list[_Group] = []
    for group in sorted(groups, key=lambda group: -group.length):
        if batch and not fit([*batch, group]):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _fit_alone(groups: Sequence[_Group]) -> bool:
    return len(groups) * groups[0].length <= BATCH


def _fit_shared(groups: Sequence[_Group], window: int) -> bool:
    """Whether each of the two passes is small enough, and with its padding within the window."""
    context = max(len(group.context) for group in groups)
    continuation = max(group.longest for group in groups)
    rows = sum(len(group.numbers) for group in groups)
    passes = len(groups) * context, rows * continuation
    return max(passes) <= BATCH and context + continuation - 1 <= window


@torch.inference_mode()
def _read_alone(model: CausalModel, groups: Sequence[_Group]) -> dict[int, ContinuationScore]:
    """One pass over contexts and continuations; each group has one continuation."""
    texts = [[*group.context, *group.continuations[0]] for group in groups]
    states = final_states(model, _padded([text[:-1] for text in texts], model.device))
    parts = [states[row, len(group.context) - 1 : group.length] for row, group in enumerate(groups)]
    targets = [token for group in groups for token in group.continuations[0]]
    chosen = _chosen(model, torch.cat(parts), range(len(targets)), targets)
    return {group.numbers[0]: _score(group.continuations[0], chosen) for group in groups}


@torch.inference_mode()
def _read_shared(model: CausalModel, groups: Sequence[_Group]) -> dict[int, ContinuationScore]:
    """A pass over the contexts, which predicts first tokens, then one over the continuations."""
    lengths = [len(group.context) for group in groups]
    cache = model.new_cache(len(groups), max(group.length for group in groups))
    contexts = _padded([group.context for group in groups], model.device)
    with evaluating(model):
        states = model.states(contexts, cache, lengths, ())[:, :, 0]
    last = states[torch.arange(len(groups)), torch.tensor(lengths) - 1]  # (groups, width)

    rows = [(row, new) for row, group in enumerate(groups) for new in group.continuations]
    longer = [(row, new) for row, new in rows if len(new) > 1]
    parts = [last]
    if longer:
        cache.select([row for row, _ in longer])
        counts = [len(new) - 1 for _, new in longer]
        rest = _padded([new[:-1] for _, new in longer], model.device)
        with evaluating(model):
            states = model.states(rest, cache, counts, ())[:, :, 0]
        parts += [states[row, :count] for row, count in enumerate(counts)]
    later = [token for _, new in longer for token in new[1:]]
    states_of = [*(row for row, _ in rows), *range(len(groups), len(groups) + len(later))]
    chosen = _chosen(model, torch.cat(parts), states_of, [*(new[0] for _, new in rows), *later])
    firsts = iter([next(chosen) for _ in rows])

    scores = {}
    for group in groups:
        for number, new in zip(group.numbers, group.continuations, strict=True):
            scores[number] = _score(new, iter([next(firsts), *(next(chosen) for _ in new[1:])]))
    return scores


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(rows, longest) int64, with zeros on the right."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)] = torch.tensor(tokens)
    return padded.to(device)


def _chosen(
    model: CausalModel, states: Tensor, states_of: Sequence[int], targets: Sequence[int]
) -> Iterator[tuple[float, bool]]:
    """For each target its log-probability, and whether it is the most probable token.

    states: (n, width). states_of: for each target the index of the state that predicts it, in
    ascending order. The logits of a state are computed once, and those of CHUNK states at a time.
    """
    index = torch.tensor(states_of, device=states.device)
    tokens = torch.tensor(targets, device=states.device)
    for start in range(0, len(states), CHUNK):
        with evaluating(model):
            logits = model.logits(states[start : start + CHUNK])
        first, end = torch.searchsorted(index, torch.tensor([start, start + CHUNK]).to(index))
        rows, wanted = index[first:end] - start, tokens[first:end]
        logprobs = logits[rows, wanted] - logits.logsumexp(-1)[rows]
        greedy = logits.argmax(-1)[rows] == wanted
        yield from zip(logprobs.tolist(), greedy.tolist(), strict=True)


def _score(tokens: Sequence[int], chosen: Iterator[tuple[float, bool]]) -> ContinuationScore:
    taken = [next(chosen) for _ in tokens]
    return ContinuationScore(
        list(tokens), [logprob for logprob, _ in taken], all(greedy for _, greedy in taken)
    )


BATCH = 4096
"""The most tokens of a pass, padding counted, unless one text is longer."""
_AHEAD = 2**16
