"""Multinomial (ancestral) sampling: v ~ softmax(logits / T).

    argminᵥ E(v) / p(v)

where each row, position and token has an exponential random number E of its own: a race in which
tokens win as often as they are likely (the Gumbel-max trick; Gumbel 1954, Maddison et al. 2014).
So a row's text depends on its own random stream alone; a small change of the logits, by another
batch or a draft model's, seldom changes the token; and a truncation changes it only if it cuts
it off.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.processors.temperature import Temperature


class Multinomial(gptk.Sampler):
    """A token drawn from the model's distribution."""

    name = "multinomial"
    example = "temperature=0.8"
    random = True

    temperature: float = Field(
        1.0, ge=1e-6, le=1e6, description="below 1 sharpens, above 1 flattens"
    )

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return () if self.temperature == 1 else (Temperature(temperature=self.temperature),)

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        # Both ways draw the same tokens; a look at some logits says which is the quicker.
        some = logits[:, ::64]
        if 8 * _count(some) < some.numel():
            tokens, chosen, highest, total = _draw_among_few(logits, rows)
        else:
            highest = logits.amax(dim=-1)
            weights = (logits - highest[:, None]).exp()
            tokens = _argmin(rows.exponential(logits.shape[-1]) / weights)
            total = weights.sum(dim=-1)
            chosen = logits.gather(1, tokens[:, None])[:, 0]
        # As Choice.one_each, with the sum of exponentials that is at hand.
        logprobs = chosen - highest - total.log()
        return gptk.Choice(tokens=tokens, logprobs=logprobs, scores=rows.scores + logprobs)


def _draw_among_few(logits: Tensor, rows: gptk.Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draw, its logits, the highest ones, and the sums of weights where few tokens are left.

    It takes a third of the time that the whole vocabulary takes.
    """
    row, token = _places(logits)
    if len(rows) == 1 and len(token):
        few = logits[0, token]
        highest = few.amax()[None]
        weights = (few - highest).exp()
        race = rows.exponential_at(row, token) / weights
        best = race.argmin()
        return token[best][None], few[best][None], highest, weights.sum()[None]
    highest = logits.amax(dim=-1)
    weights = (logits[row, token] - highest[row]).exp()
    race = rows.exponential_at(row, token) / weights
    first = torch.full_like(highest, torch.inf).scatter_reduce(0, row, race, "amin")
    won = race == first[row]
    # A row without any token is left with token 0, whose score says so.
    tokens = torch.zeros_like(highest, dtype=torch.int64).scatter(0, row[won], token[won])
    total = torch.zeros_like(highest).index_add(0, row, weights)
    return tokens, logits.gather(1, tokens[:, None])[:, 0], highest, total


def _count(logits: Tensor) -> int:
    """How many are finite."""
    if logits.device.type == "cpu":  # numpy takes a third of the time
        return int(np.count_nonzero(logits.numpy() > -np.inf))
    return int(torch.count_nonzero(logits > -torch.inf))


def _argmin(race: Tensor) -> Tensor:
    """The place of the smallest number of each row."""
    if race.device.type == "cpu":  # numpy takes an eighth of the time
        return torch.from_numpy(race.numpy().argmin(axis=-1))
    return race.argmin(dim=-1)


def _places(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Row and token of each finite logit, row by row."""
    if logits.device.type == "cpu":  # numpy finds them in a third of the time
        flat = torch.from_numpy(np.flatnonzero(logits.numpy() > -np.inf))
        if len(logits) == 1:
            return torch.zeros_like(flat), flat
        return flat // logits.shape[1], flat % logits.shape[1]
    row, token = (logits > -torch.inf).nonzero(as_tuple=True)
    return row, token
