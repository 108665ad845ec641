"""What beam searches share: choosing among the candidates of several rows."""

from collections import Counter

import torch
from torch import Tensor

import gptk


def candidates_per_place(rows: gptk.Rows) -> int:
    """How many candidates a place needs so that it is filled by a row that goes on.

    Each row can end in len(eos) ways, unless stop strings end more.
    """
    return max(2, 1 + len(rows.eos))


def best_of_each_prompt(keys: Tensor, rows: gptk.Rows, count: int) -> Tensor:
    """Where the `count` largest keys of each prompt are, best first, in the flattened tensor.

    keys: (rows, candidates); the rows of a prompt are adjacent. A row without a token to go on
    with has keys that are no numbers; they come last.
    """
    keys = keys.masked_fill(keys.isnan(), -torch.inf)
    picked = []
    first = 0
    for size in Counter(rows.prompts).values():
        block = keys[first : first + size].flatten()
        picked.append(block.topk(min(count, len(block))).indices + first * keys.shape[1])
        first += size
    return torch.cat(picked)


def choice_at(at: Tensor, tokens: Tensor, logprobs: Tensor, scores: Tensor) -> gptk.Choice:
    """The candidates at places of the flattened tensors, all three (rows, candidates)."""
    return gptk.Choice(
        tokens=tokens.flatten()[at],
        logprobs=logprobs.flatten()[at],
        scores=scores.flatten()[at],
        parents=at // tokens.shape[1],
    )
