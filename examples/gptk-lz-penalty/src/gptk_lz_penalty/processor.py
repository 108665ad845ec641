"""LZ penalty (Ginart et al. 2025): tokens pay for what LZ77 would save by writing them down.

    logit(v) - strength · (log2 V - Δ(v))        Δ(v): the bits that v adds to the code

where V is the size of the vocabulary, l the length of the longest sequence, of at most `buffer`
tokens, that ends the row and stands within its last `window` tokens before, d how far back that
is, λ(v) the length of the longest such sequence with v next, v included, and δ(v) how far back:

    Δ(v) = log2 V                                  λ(v) = 0: v is not in the window, a literal
           log2 (1 - (d - l + 1) / (l · d)) - 1    λ(v) = l + 1 > 2: v prolongs the match
           min(log2 δ(v), log2 V)                  else: v begins a new match

The nearest of several sequences of the same length counts. The prompt is part of the row. The
penalty of a literal is 0 and no other is less, so the paper's logit(v) + strength · Δ(v), which
is the same for all tokens but one number, leaves more logits as they are when written this way.
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
        0.15, ge=0, le=100, description="taken off the logit for each bit saved; 0: nothing"
    )
    window: int = Field(
        512, ge=1, description="how many of the last tokens are searched for what ends the row"
    )
    buffer: int = Field(
        32, ge=1, description="how many tokens a match may have before the one that follows it"
    )

    def start(self, rows: gptk.Rows) -> "Matches":
        return Matches(self, rows)


class Matches(gptk.Follower):
    """For each row its window, and for each place there how much of the row's end ends there."""

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
    """A row's tokens and matches. It is never changed, so that copies of the row may share it."""

    tokens: Ints
    """All of them: a rewound window reaches further back."""
    lengths: Ints
    """For each place of the window how many tokens before it are those that end the row, counted
    as far as `buffer`, and past the window's beginning."""

    @classmethod
    def of(cls, tokens: Sequence[int] | Ints, options: LZPenalty) -> "_Row":
        """The places still in question, one token further back at a time."""
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
        """A match goes on, one place further, where its next token has come."""
        tokens, lengths = self.tokens, self.lengths
        for token in new:
            window = tokens[len(tokens) - len(lengths) :]
            longer = np.minimum(lengths + 1, options.buffer) * (window == token)
            # Nothing comes before a row's first token.
            full = len(window) == options.window
            lengths = longer if full else np.concatenate((np.zeros(1, np.int64), longer))
            tokens = np.append(tokens, token)
        return _Row(tokens, lengths)

    def bits(self, literal: float) -> tuple[Ints, Floats]:
        """The window's tokens, and what each would add to the code in the place that it has.

        literal: what a token outside the window adds. The last of equal tokens is the one that
        counts: the next of a longest match, and of those the nearest.
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
