"""Frequency penalty (OpenAI's API): logit - penalty · count.

count is how often the token is among the row's new tokens, as with OpenAI and vLLM; llama.cpp
counts in the prompt, too.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class FrequencyPenalty(gptk.LogitsProcessor):
    """Makes tokens less likely the more often the new text has them."""

    name = "frequency-penalty"
    example = "penalty=0.5"

    penalty: float = Field(
        0.5,
        ge=-1e6,
        le=1e6,
        description="off the logit for each time; 0 changes nothing, below 0 rewards",
    )
    prompt: bool = Field(False, description="whether to count in the prompt, too")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        counts = token_counts(logits, rows, prompt=self.prompt)
        return torch.sub(logits, counts, alpha=self.penalty)


def token_counts(logits: Tensor, rows: gptk.Rows, *, prompt: bool) -> Tensor:
    """(rows, vocab): how often each row has each token after its prompt, or in all."""
    counted = rows.mask if prompt else rows.new_mask
    return torch.zeros_like(logits).scatter_add_(1, rows.tokens, counted.to(logits.dtype))
