"""LZ penalty (Ginart et al. 2025): tokens are penalized by the bits that LZ77 would save on them.

    logit(v) - strength · (log2 V - Δ(v))        Δ(v): the bits that v adds to the code

where V is the size of the vocabulary; l is the length of the longest sequence, of at most `buffer`
tokens, that ends the row and occurs earlier within its last `window` tokens, and d how far back;
λ(v) is the length of the longest such sequence with v next, v included, and δ(v) how far back:

    Δ(v) = log2 V                                  λ(v) = 0: v is not in the window, a literal
           log2 (1 - (d - l + 1) / (l · d)) - 1    λ(v) = l + 1 > 2: v prolongs the match
           min(log2 δ(v), log2 V)                  else: v begins a new match

Of several sequences of the same length the nearest counts. The prompt is part of the row. The paper
has logit(v) + strength · Δ(v), which differs by the same constant for all tokens; in this form the
penalty of a literal, the smallest one, is 0, so that most logits stay unchanged.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

import gptk

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class LZPenalty(gptk.LogitsProcessor):
    """Penalizes tokens by the bits that Lempel-Ziv compression would save on them."""

    name = "lz-penalty"
    example = "strength=0.15"

    strength: float = Field(
        0.15, ge=0, le=100, description="subtracted for each bit saved; 0: no penalty"
    )
    window: int = Field(
        512, ge=1, description="how many of the last tokens are searched for matches"
    )
    buffer: int = Field(
        32, ge=1, description="the longest match, without the token that follows it"
    )

    def start(self, rows: gptk.Rows) -> "Matches":
        return Matches(self, rows)


class Matches(gptk.Follower):
    """For each row the matches of its end within its window."""

    def __init__(self, options: LZPenalty, rows: gptk.Rows) -> None:
        self._options = options
        self._rows = [
            _Row.of(rows.tokens[row, :length].tolist(), options)
            for row, length in enumerate(rows.lengths)
        ]

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        strength = self._options.strength
        if not strength:
            return logits
        size = logits.shape[-1]
        penalties = np.zeros((len(self._rows), size), dtype=np.float32)
        for row, penalty in zip(self._rows, penalties, strict=True):
            tokens, bits = row.bits(math.log2(size))
            penalty[tokens] = strength * (math.log2(size) - bits)  # the last of equal tokens stays
        return logits - torch.from_numpy(penalties).to(logits.device)

    def extend(self, tokens: Tensor) -> None:
        self._rows = [
            row.extended(new, self._options)
            for row, new in zip(self._rows, tokens.tolist(), strict=True)
        ]

    def select(self, parents: Sequence[int]) -> None:
        self._rows = [self._rows[parent] for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self._rows = [
            _Row.of(row.tokens[:-count], self._options) if count else row
            for row, count in zip(self._rows, counts, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Row:
    """A row's tokens and matches. Immutable, so that copies of a row share it."""

    tokens: Ints
    """All tokens of the row: after a rewind the window reaches further back."""
    lengths: Ints
    """For each position of the window, the length of the longest common suffix of the tokens before
    it and the row, up to `buffer`. It can begin before the window."""

    @classmethod
    def of(cls, tokens: Sequence[int] | Ints, options: LZPenalty) -> "_Row":
        """Compares one token further back at a time, for the positions that have matched so far."""
        all_ = np.asarray(tokens, dtype=np.int64)
        end = len(all_)
        begin = max(0, end - options.window)
        lengths = np.zeros(end - begin, dtype=np.int64)
        places = np.arange(begin, end)
        for length in range(1, options.buffer + 1):
            places = places[places >= length]
            places = places[all_[places - length] == all_[end - length]]
            if not places.size:
                break
            lengths[places - begin] = length
        return cls(all_, lengths)

    def extended(self, new: Iterable[int], options: LZPenalty) -> "_Row":
        """A match moves on by one position if its next token is the new one, and ends otherwise."""
        tokens, lengths = self.tokens, self.lengths
        for token in new:
            window = tokens[len(tokens) - len(lengths) :]
            longer = np.minimum(lengths + 1, options.buffer) * (window == token)
            # The window grows by a position, at the row's first token, which no match precedes.
            full = len(window) == options.window
            lengths = longer if full else np.concatenate((np.zeros(1, np.int64), longer))
            tokens = np.append(tokens, token)
        return _Row(tokens, lengths)

    def bits(self, literal: float) -> tuple[Ints, Floats]:
        """The window's tokens, and the bits that each would add to the code as the next token.

        literal: the bits of a token outside the window. Of equal tokens the last one counts: that
        after the longest match, and of those the nearest.
        """
        size = len(self.lengths)
        places = np.arange(size)
        lengths = np.minimum(self.lengths, places)  # no match begins before the window
        distances = size - places
        bits = np.minimum(np.log2(distances), literal)
        length = int(lengths.max(initial=0))
        if length > 1:
            longest = lengths == length
            distance = int(distances[longest][-1])
            bits[longest] = math.log2(1 - (distance - length + 1) / (length * distance)) - 1
        order = lengths.argsort(kind="stable")
        return self.tokens[len(self.tokens) - size :][order], bits[order]
