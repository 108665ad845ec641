r"""Minimum length: EOS is masked while the row has fewer than n new tokens.

$$\text{logit}'(\text{EOS}) = -\infty \quad\text{while new tokens} < n$$
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class MinNewTokens(gptk.LogitsProcessor):
    """Masks EOS until a row has n new tokens."""

    name = "min-new-tokens"
    example = "n=20"
    positional = "n"
    other_names = {"min_tokens": "n"}

    n: int = Field(ge=0, description="new tokens before a row may end, EOS not counted")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        short = [
            length - start < self.n
            for length, start in zip(rows.lengths, rows.prompt_lengths, strict=True)
        ]
        eos = [token for token in rows.eos if token < logits.shape[-1]]
        if not eos or not any(short):
            return logits
        ends = logits[:, eos]
        index = torch.tensor(eos, device=logits.device)
        ends = ends.masked_fill(torch.tensor(short, device=logits.device)[:, None], -torch.inf)
        return logits.index_copy(1, index, ends)
