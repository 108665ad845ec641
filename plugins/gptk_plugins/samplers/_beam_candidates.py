"""What beam searches share: choosing among the candidates of several rows."""

from collections import Counter

import torch
from torch import Tensor

import gptk


def candidates_per_beam(rows: gptk.Rows) -> int:
    """How many candidates a beam needs so that at least one of them does not end with EOS.

    A row ends with EOS in at most len(rows.eos) ways. Stop strings can end further candidates.
    """
    return max(2, 1 + len(rows.eos))


def best_of_each_prompt(keys: Tensor, rows: gptk.Rows, count: int) -> Tensor:
    """The candidates with the `count` largest keys of each prompt, best first.

    keys: (rows, candidates); the rows of a prompt are adjacent. Returns indices into the flattened
    keys, prompt by prompt. The keys of a row without a possible token are NaN; they come last.
    """
    keys = keys.masked_fill(keys.isnan(), -torch.inf)
    picked = []
    first = 0
    for size in Counter(rows.prompts).values():
        block = keys[first : first + size].flatten()
        picked.append(block.topk(min(count, len(block))).indices + first * keys.shape[1])
        first += size
    return torch.cat(picked)


def choice_of(candidates: Tensor, tokens: Tensor, logprobs: Tensor, scores: Tensor) -> gptk.Choice:
    """The choice of some candidates, as indices into the flattened tensors.

    tokens, logprobs, scores: (rows, candidates).
    """
    return gptk.Choice(
        tokens=tokens.flatten()[candidates],
        logprobs=logprobs.flatten()[candidates],
        scores=scores.flatten()[candidates],
        parents=candidates // tokens.shape[1],
    )
