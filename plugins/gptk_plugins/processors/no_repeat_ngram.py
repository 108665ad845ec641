"""No repeated n-grams (Paulus et al. 2018): no `size` tokens in a row come twice.

    logit'(v) = -inf if the row already has its last size - 1 tokens with v next

The prompt is part of the row.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class NoRepeatNgram(gptk.LogitsProcessor):
    """Takes out tokens that would complete a sequence of `size` tokens for a second time."""

    name = "no-repeat-ngram"
    example = "size=3"

    size: int = Field(3, ge=1, description="of the sequences that may come once; 1: of tokens")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        before = self.size - 1
        tokens = rows.tokens
        if tokens.shape[1] < self.size:
            return logits
        lengths = torch.tensor(rows.lengths, device=tokens.device)[:, None]
        last = (lengths - before + torch.arange(before, device=tokens.device)).clamp(min=0)
        windows = tokens.unfold(1, self.size, 1)  # (rows, places, size)
        repeats = (windows[..., :before] == tokens.gather(1, last)[:, None]).all(dim=-1)
        # In a row that is shorter than others, windows with padding are none of its n-grams.
        repeats &= torch.arange(windows.shape[1], device=tokens.device) + before < lengths
        # The least of what there is and this; several windows may end in the same token.
        ceiling = torch.where(repeats, -torch.inf, torch.inf)
        return logits.scatter_reduce(1, windows[..., before], ceiling, "amin")
