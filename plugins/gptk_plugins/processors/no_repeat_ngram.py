r"""No repeated n-grams (Paulus et al. 2018): no sequence of `size` tokens occurs twice.

$$\text{logit}'(v) = -\infty$$

if $v$ has followed the row's last `size` - 1 tokens before. The prompt is part of the row.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class NoRepeatNgram(gptk.LogitsProcessor):
    """Bans tokens that would complete a sequence of `size` tokens for a second time."""

    name = "no-repeat-ngram"
    example = "size=3"
    positional = "size"
    other_names = {"no_repeat_ngram_size": "size"}

    size: int = Field(3, ge=1, description="length of the sequences that may occur once")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        before = self.size - 1
        tokens = rows.tokens
        if tokens.shape[1] < self.size:
            return logits
        lengths = torch.tensor(rows.lengths, device=tokens.device)[:, None]
        last = (lengths - before + torch.arange(before, device=tokens.device)).clamp(min=0)
        windows = tokens.unfold(1, self.size, 1)  # (rows, positions, size)
        repeats = (windows[..., :before] == tokens.gather(1, last)[:, None]).all(dim=-1)
        # In rows shorter than others, windows that contain padding do not count.
        repeats &= torch.arange(windows.shape[1], device=tokens.device) + before < lengths
        # The minimum, because several windows may end in the same token.
        ceiling = torch.where(repeats, -torch.inf, torch.inf)
        return logits.scatter_reduce(1, windows[..., before], ceiling, "amin")
