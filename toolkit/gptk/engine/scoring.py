"""The log-probabilities of texts under a model: each token's, given those before it.

A context and its continuations, as a question of a multiple choice has, are a run of the engine:
the context is read once, and the continuations as rows that share it. So the texts of many runs are
read in the passes that the engine joins, within its memory.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptk.engine.engine import ENGINE
from gptk.engine.model import JoinedModel
from gptk.engine.run import Run
from gptk.errors import counted
from gptk.model.blocks import BlockCache
from gptk.model.protocol import Cache, CausalModel

Pair = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context, at least one, and of its continuation."""


@dataclass(frozen=True, repr=False)
class Score:
    """How probable a text is under a model."""

    tokens: list[int]
    token_logprobs: list[float]
    """For each token but the first its log-probability, given the tokens before it, in nats."""

    @property
    def loss(self) -> float:
        """The mean negative log-probability, in nats a token (cross entropy)."""
        return -math.fsum(self.token_logprobs) / len(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally probable tokens that would give the same loss."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def __repr__(self) -> str:
        return (
            f"Score({counted(len(self.tokens), 'token')}, loss {self.loss:.4f}, "
            f"perplexity {self.perplexity:.4f})"
        )


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


def score(model: CausalModel, ids: Sequence[int]) -> Score:
    """The log-probability of each token but the first. ids: two or more, within the window."""
    (scored,) = score_continuations(model, [(ids[:1], ids[1:])])
    return Score(list(ids), scored.token_logprobs)


def score_continuations(model: CausalModel, pairs: Iterable[Pair]) -> Iterator[ContinuationScore]:
    """The score of each continuation, in the order of the pairs.

    Context and continuation without its last token must fit into the model's window together. The
    pairs are taken as scores are asked for, some 65,000 tokens ahead. What is under way when the
    iterator is closed is cancelled.
    """
    if ENGINE.is_inside:  # a part of the run that asks
        for context, new in pairs:
            yield from _scores(model, context, [new])
        return
    under_way: deque[_Started] = deque()
    try:
        for part in _parts(pairs):
            under_way.append(_Started(model, part))
            if len(under_way) == 2:
                yield from under_way[0].scores()
                under_way.popleft()
        for started in under_way:
            yield from started.scores()
    finally:
        for started in under_way:
            started.cancel()


def _parts(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Consecutive pairs, with enough tokens to keep the engine at work."""
    part: list[Pair] = []
    tokens = 0
    for pair in pairs:
        part.append(pair)
        tokens += sum(map(len, pair))
        if tokens >= _AHEAD // 2:
            yield part
            part, tokens = [], 0
    yield part


class _Started:
    """Pairs whose scores are being computed, those with the same context in one run."""

    def __init__(self, model: CausalModel, pairs: Sequence[Pair]) -> None:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (context, _) in enumerate(pairs):
            by_context.setdefault(tuple(context), []).append(number)
        self._runs: list[Run[list[ContinuationScore]]] = []
        self._where = [(0, 0)] * len(pairs)
        """For each pair its run, and which of the run's scores is its own."""
        for context, numbers in by_context.items():
            for start in range(0, len(numbers), _MOST_ROWS):
                few = numbers[start : start + _MOST_ROWS]
                for place, number in enumerate(few):
                    self._where[number] = len(self._runs), place
                self._runs.append(_run(model, context, [pairs[number][1] for number in few]))
        ENGINE.start(self._runs)

    def scores(self) -> Iterator[ContinuationScore]:
        """Those of the pairs, in their order."""
        results: dict[int, list[ContinuationScore]] = {}
        for run, place in self._where:
            if run not in results:
                results[run] = self._runs[run].result()
            yield results[run][place]

    def cancel(self) -> None:
        for run in self._runs:
            run.cancel()


def _run(
    model: CausalModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Run[list[ContinuationScore]]:
    return Run(lambda: _scores(model, context, continuations), rows=len(continuations))


def _scores(
    model: CausalModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[ContinuationScore]:
    """The scores of continuations of one context; a run of the engine."""
    if not any(continuations):
        return [ContinuationScore([], [], True) for _ in continuations]
    states = _states(model, context, continuations)
    # The context's last state predicts all first tokens; each other state predicts one token.
    firsts = [new[0] for new in continuations if new]
    later = [token for new in continuations for token in new[1:]]
    predicted_by = [*(0 for _ in firsts), *range(1, 1 + len(later))]
    chosen = _chosen(model, states, predicted_by, firsts + later)
    of_firsts = iter([next(chosen) for _ in firsts])
    scores = []
    for new in continuations:
        of_new = [next(of_firsts) for _ in new[:1]] + [next(chosen) for _ in new[1:]]
        logprobs = [logprob for logprob, _ in of_new]
        scores.append(ContinuationScore(list(new), logprobs, all(greedy for _, greedy in of_new)))
    return scores


def _states(
    model: CausalModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Tensor:
    """The states after the context's last token, and after each token of the continuations but
    their last ones: (1 + tokens, width)."""
    joined = ENGINE.joined(model)
    assert isinstance(joined, JoinedModel)  # within a run
    cache = joined.new_cache(1, len(context) + max(map(len, continuations)))
    if len(continuations) == 1:
        new = continuations[0]
        return _read(joined, cache, [*context, *new[:-1]], len(new))
    parts = [_read(joined, cache, context, 1)]
    rows = [new[:-1] for new in continuations if len(new) > 1]
    if rows:
        cache.select([0] * len(rows))
        counts = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(counts), dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        states = joined.states(ids.to(model.device), cache, counts)
        parts += [states[row, :count, 0] for row, count in enumerate(counts)]
    return torch.cat(parts)


def _read(model: JoinedModel, cache: Cache, text: Sequence[int], wanted: int) -> Tensor:
    """Read a row, or what of it is not known. The states of its last tokens: (wanted, width)."""
    known = 0
    if isinstance(cache, BlockCache):
        cache.recall([text[: len(text) - wanted + 1]])
        known = cache.lengths[0]
    ids = torch.tensor([text[known:]], device=model.device)
    return model.states(ids, cache, wanted=wanted)[0, :, 0]


def _chosen(
    model: CausalModel, states: Tensor, predicted_by: Sequence[int], tokens: Sequence[int]
) -> Iterator[tuple[float, bool]]:
    """For each token its log-probability, and whether it is the most probable one.

    states: (n, width). predicted_by: for each token the index of the state that predicts it, in
    ascending order. Computes the logits of CHUNK states at a time.
    """
    joined = ENGINE.joined(model)
    of_tokens = torch.tensor(predicted_by, device=states.device)
    wanted = torch.tensor(tokens, device=states.device)
    for start in range(0, len(states), CHUNK):
        logits = joined.logits(states[start : start + CHUNK])
        bounds = torch.tensor([start, start + CHUNK], device=states.device)
        first, end = torch.searchsorted(of_tokens, bounds)
        rows, targets = of_tokens[first:end] - start, wanted[first:end]
        logprobs = logits[rows, targets] - logits.logsumexp(-1)[rows]
        greedy = logits.argmax(-1)[rows] == targets
        yield from zip(logprobs.tolist(), greedy.tolist(), strict=True)


CHUNK = 256
"""States whose logits are computed at a time: 50 MB with GPT-2's vocabulary."""
_MOST_ROWS = 64
"""Continuations that are read at a time."""
_AHEAD = 2**16
