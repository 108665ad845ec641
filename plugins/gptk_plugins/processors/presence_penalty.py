r"""Presence penalty (OpenAI's API): a penalty if the token is among the row's new tokens.

$$\text{logit}'(v) = \text{logit}(v) - \text{penalty} \cdot [\,v \in \text{new tokens}\,]$$

As with OpenAI and vLLM; llama.cpp looks at the prompt, too.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.processors.frequency_penalty import token_counts


class PresencePenalty(gptk.LogitsProcessor):
    """Lowers the logits of tokens that the new text already has, however often."""

    name = "presence-penalty"
    example = "penalty=0.5"
    positional = "penalty"

    penalty: float = Field(
        0.5,
        ge=-1e6,
        le=1e6,
        description="subtracted from the logit; 0 changes nothing, below 0 rewards repetition",
    )
    prompt: bool = Field(False, description="whether the prompt's tokens count, too")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        present = token_counts(logits, rows, prompt=self.prompt).clamp_(max=1)
        return torch.sub(logits, present, alpha=self.penalty)
