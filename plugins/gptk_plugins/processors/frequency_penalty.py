r"""Frequency penalty (OpenAI's API): a penalty for each time that a token has occurred.

$$\text{logit}'(v) = \text{logit}(v) - \text{penalty} \cdot \text{count}(v)$$

count is how often the token occurs in the row's new tokens, as with OpenAI and vLLM; llama.cpp
counts in the prompt, too.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class FrequencyPenalty(gptk.LogitsProcessor):
    """Lowers a token's logit for each time that the new text already has it."""

    name = "frequency-penalty"
    example = "penalty=0.5"
    positional = "penalty"

    penalty: float = Field(
        0.5,
        ge=-1e6,
        le=1e6,
        description="subtracted for each occurrence; 0 changes nothing, below 0 rewards repetition",
    )
    prompt: bool = Field(False, description="whether to count in the prompt, too")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        counts = token_counts(logits, rows, prompt=self.prompt)
        return torch.sub(logits, counts, alpha=self.penalty)


def token_counts(logits: Tensor, rows: gptk.Rows, *, prompt: bool) -> Tensor:
    """How often each token occurs in each row: (rows, vocab). prompt: count in the prompt, too."""
    counted = rows.mask if prompt else rows.new_mask
    return torch.zeros_like(logits).scatter_add_(1, rows.tokens, counted.to(logits.dtype))
