"""Prompt lookup (Saxena 2023): drafts the tokens that followed the row's last tokens before.

The row's last n tokens are searched earlier in the row, prompt included, for n = `ngram` down to 1;
the guess is what came after the latest match. It needs no second model, and speeds up texts that
repeat themselves or their prompt: summaries, code, edits.
"""

import torch
from pydantic import Field
from torch import Tensor

import gptk


class Lookup(gptk.Drafter):
    """Guesses the tokens that followed the row's last tokens at their previous occurrence."""

    name = "lookup"
    example = "ngram=3,tokens=8"
    positional = "tokens"

    ngram: int = Field(3, ge=1, description="the most tokens to look for")
    tokens: int = Field(8, ge=1, description="the most tokens to guess at a time")

    def start(self, run: gptk.Run) -> gptk.Draft:
        return self

    def propose(self, run: gptk.Run, count: int) -> Tensor | None:
        rows = run.session.rows
        count = min(count, self.tokens)
        guesses = torch.full((len(rows), count), -1)
        for row, length in enumerate(rows.lengths):
            found = self._continuation(rows.tokens[row, :length].cpu(), count)
            guesses[row, : len(found)] = found
        guesses = guesses[:, : int((guesses >= 0).sum(dim=1).max())]
        return guesses.to(rows.tokens.device) if guesses.shape[1] else None

    def _continuation(self, tokens: Tensor, count: int) -> Tensor:
        """Up to `count` tokens after the latest match of the last tokens. tokens: (length,)."""
        for size in range(min(self.ngram, len(tokens) - 1), 0, -1):
            windows = tokens[:-1].unfold(0, size, 1)
            matches = (windows == tokens[-size:]).all(dim=1).nonzero()
            if len(matches):
                start = int(matches[-1]) + size
                return tokens[start : start + count]
        return tokens[:0]
