r"""Contrastive search (Su et al. 2022): a likely token whose hidden state is unlike earlier ones.

$$\operatorname*{argmax}_{v\,\in\,\text{top-}k}\ (1 - \alpha) p(v) - \alpha \max_j \cos(h_v, h_j)$$

$h_v$ is the final hidden state that the model would have after $v$, $h_j$ those of the row so far,
prompt included. Each step therefore runs the model on $k$ continuations of every row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import gptk


class Contrastive(gptk.Sampler):
    """Weighs a token's probability against its hidden state's similarity to earlier ones."""

    name = "contrastive"
    example = "k=4,alpha=0.6"
    positional = "k"
    other_names = {"penalty_alpha": "alpha"}

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
        if not bool(top.values[:, 0].isfinite().all()):  # a row without candidates
            run.commit(gptk.Choice.one_each(top.tokens[:, 0], logits, session.rows))
            return
        logprobs = gptk.vocabulary.logprobs_of(top.values, logits)
        scores = session.rows.scores[:, None] + logprobs

        session.select([row for row in range(count) for _ in range(k)])
        session.extend(top.tokens.flatten())
        states = F.normalize(session.hidden.float(), dim=-1)
        penalty = context.max_cosine(states).view(count, k)
        # A masked token has probability 0 and must not win by being dissimilar.
        objective = (1 - self.alpha) * logprobs.exp() - self.alpha * penalty
        best = objective.masked_fill(logprobs == -torch.inf, -torch.inf).argmax(dim=-1)

        chosen = torch.arange(count, device=best.device) * k + best  # of the rows · k candidates
        session.select(chosen.tolist())
        context.set_last(states[chosen])
        run.commit(
            gptk.Choice(
                tokens=top.tokens.flatten()[chosen],
                logprobs=logprobs.flatten()[chosen],
                scores=scores.flatten()[chosen],
            ),
            extended=True,
        )


class Context(gptk.Follower):
    """The normalized final hidden states of each row's tokens; 0 past a row's end."""

    def __init__(self, session: gptk.DecodeSession) -> None:
        window = session.model.config.context_length
        self._states = F.normalize(session.all_hidden().float(), dim=-1)
        self._lengths = [min(length, window) for length in session.rows.lengths]

    def max_cosine(self, states: Tensor) -> Tensor:
        """The largest cosine to the states before each row's last token: (rows,).

        states: (rows, width), normalized.
        """
        cosines = torch.einsum("rtw,rw->rt", self._states, states)
        before = torch.tensor(self._lengths, device=states.device)[:, None] - 1
        in_row = torch.arange(cosines.shape[1], device=states.device) < before
        return cosines.masked_fill(~in_row, -torch.inf).amax(dim=-1)

    def set_last(self, states: Tensor) -> None:
        """Store the states of the rows' last tokens. states: (rows, width), normalized."""
        last = torch.tensor(self._lengths, device=states.device) - 1
        self._states[torch.arange(len(last), device=states.device), last] = states

    def extend(self, tokens: Tensor) -> None:
        self._lengths = [length + tokens.shape[1] for length in self._lengths]
        if max(self._lengths) > self._states.shape[1]:
            # 64 more than needed, so that it does not grow at each step.
            added = max(self._lengths) - self._states.shape[1] + 64
            self._states = F.pad(self._states, (0, 0, 0, added))

    def select(self, parents: Sequence[int]) -> None:
        self._states = self._states[torch.tensor(parents, device=self._states.device)]
        self._lengths = [self._lengths[parent] for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self._lengths = [
            length - count for length, count in zip(self._lengths, counts, strict=True)
        ]
