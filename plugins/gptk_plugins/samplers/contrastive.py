"""Contrastive search (Su et al. 2022): a likely token whose state is unlike all before it.

    argmaxᵥ (1 - α) · p(v) - α · maxⱼ cos(h_v, h_j),   v among the k likeliest tokens

h_v is the final hidden state that the model would have after v, h_j those of the row so far,
prompt included. So each step runs the model on k continuations of every row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import gptk


class Contrastive(gptk.Sampler):
    """Weighs a token's probability against how much it repeats what the row has."""

    name = "contrastive"
    example = "k=4,alpha=0.6"

    k: int = Field(4, ge=1, description="how many candidates to weigh")
    alpha: float = Field(0.6, ge=0, le=1, description="weight of the penalty; 0 is greedy")

    def start(self, run: gptk.Run) -> object:
        if not run.session.model.config.width:
            raise gptk.IncompatibleError(
                f"sampler {self.name} compares hidden states, and this model has none to compare"
            )
        return Context(run.session)

    def advance(self, run: gptk.Run) -> None:
        session, context = run.session, run.state
        assert isinstance(context, Context)
        logits = run.processed_logits()
        count = len(session.rows)
        k = min(self.k, logits.shape[-1])
        top = gptk.vocabulary.top(logits, k)
        if not bool(top.values[:, 0].isfinite().all()):  # nothing to look ahead to
            run.commit(gptk.Choice.one_each(top.tokens[:, 0], logits, session.rows))
            return
        logprobs = gptk.vocabulary.logprobs_of(top.values, logits)
        scores = session.rows.scores[:, None] + logprobs

        session.select([row for row in range(count) for _ in range(k)])
        session.extend(top.tokens.flatten())
        states = F.normalize(session.hidden.float(), dim=-1)
        penalty = context.likest(states).view(count, k)
        # A token that was taken out has probability 0, but must not win by being different.
        weighed = (1 - self.alpha) * logprobs.exp() - self.alpha * penalty
        best = weighed.masked_fill(logprobs == -torch.inf, -torch.inf).argmax(dim=-1)

        at = torch.arange(count, device=best.device) * k + best
        session.select(at.tolist())
        context.add(states[at])
        run.commit(
            gptk.Choice(
                tokens=top.tokens.flatten()[at],
                logprobs=logprobs.flatten()[at],
                scores=scores.flatten()[at],
            ),
            extended=True,
        )


class Context(gptk.Follower):
    """The final hidden states of each row's tokens, of length 1; those past its end are 0."""

    def __init__(self, session: gptk.DecodeSession) -> None:
        window = session.model.config.context_length
        self._states = F.normalize(session.all_hidden().float(), dim=-1)
        self._lengths = [min(length, window) for length in session.rows.lengths]

    def likest(self, states: Tensor) -> Tensor:
        """(rows,): the largest cosine to what a row had before its last token."""
        cosines = torch.einsum("rtw,rw->rt", self._states, states)
        before = torch.tensor(self._lengths, device=states.device)[:, None] - 1
        there = torch.arange(cosines.shape[1], device=states.device) < before
        return cosines.masked_fill(~there, -torch.inf).amax(dim=-1)

    def add(self, states: Tensor) -> None:
        """The states of the rows' last tokens. (rows, width)"""
        last = torch.tensor(self._lengths, device=states.device) - 1
        self._states[torch.arange(len(last), device=states.device), last] = states

    def extend(self, tokens: Tensor) -> None:
        self._lengths = [length + tokens.shape[1] for length in self._lengths]
        if max(self._lengths) > self._states.shape[1]:
            room = max(self._lengths) - self._states.shape[1] + 64  # not to grow at each step
            self._states = F.pad(self._states, (0, 0, 0, room))

    def select(self, parents: Sequence[int]) -> None:
        self._states = self._states[torch.tensor(parents, device=self._states.device)]
        self._lengths = [self._lengths[parent] for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self._lengths = [have - count for have, count in zip(self._lengths, counts, strict=True)]
