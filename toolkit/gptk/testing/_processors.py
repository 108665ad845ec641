"""Logits processors that the contract of samplers puts before a sampler."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gptk


class Only(gptk.LogitsProcessor):
    """Removes all tokens but those allowed."""

    name = "only"
    allowed: tuple[int, ...]

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        masked = torch.full_like(logits, -torch.inf)
        masked[:, list(self.allowed)] = logits[:, list(self.allowed)]
        return masked


class Next(gptk.LogitsProcessor):
    """Leaves each row a single token, which depends on the row's last token."""

    name = "next"
    size: int

    def after(self, last: int, count: int) -> list[int]:
        """The tokens that follow the token `last`."""
        tokens = []
        for _ in range(count):
            last = (5 * last + 3) % (self.size - 1)  # the last token may end a text
            tokens.append(last)
        return tokens

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        masked = torch.full_like(logits, -torch.inf)
        for row, length in enumerate(rows.lengths):
            (token,) = self.after(int(rows.tokens[row, length - 1]), 1)
            masked[row, token] = logits[row, token]
        return masked


class Flat(gptk.LogitsProcessor):
    """Makes all tokens equally likely."""

    name = "flat"

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        return torch.zeros_like(logits)


class Repeats(gptk.LogitsProcessor):
    """Lowers each token's logit by the number of times that the row has it."""

    name = "repeats"

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        return logits - torch.zeros_like(logits).scatter_add_(1, rows.tokens, rows.mask.float())


class _Log:
    changed = False
    last: tuple[Tensor, Tensor] | None = None

    def has_changed(self) -> bool:
        """Whether logits that were returned have been changed since."""
        return self.changed or (self.last is not None and not torch.equal(*self.last))


class Guard(gptk.LogitsProcessor):
    """Checks at each call that the logits it returned before are unchanged."""

    name = "guard"

    @functools.cached_property
    def log(self) -> _Log:
        return _Log()

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        self.log.changed = self.log.has_changed()
        returned = logits.clone()
        self.log.last = returned, returned.clone()
        return returned


class Witness(gptk.LogitsProcessor):
    """Notes where its follower loses track of the rows."""

    name = "witness"
    lost: Any
    """A list, to which a message is added."""

    def start(self, rows: gptk.Rows) -> "_Notes":
        return _Notes(rows, self.lost)


class _Notes:
    """Each row's tokens, as the moves say they are."""

    def __init__(self, rows: gptk.Rows, lost: list[str]) -> None:
        self._tokens, self._lost = _tokens_of(rows), lost

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        tokens = _tokens_of(rows)
        if self._tokens != tokens:
            self._lost.append(_first_difference(self._tokens, tokens))
        return logits

    def extend(self, tokens: Tensor) -> None:
        self._tokens = [a + b for a, b in zip(self._tokens, tokens.tolist(), strict=True)]

    def select(self, parents: Sequence[int]) -> None:
        self._tokens = [list(self._tokens[parent]) for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self._tokens = [
            row[: len(row) - count] for row, count in zip(self._tokens, counts, strict=True)
        ]


def _tokens_of(rows: gptk.Rows) -> list[list[int]]:
    return [rows.tokens[row, :length].tolist() for row, length in enumerate(rows.lengths)]


def _first_difference(known: list[list[int]], tokens: list[list[int]]) -> str:
    """The first row of which a follower has other tokens, in words."""
    if len(known) != len(tokens):
        return f"by its moves a follower has {len(known)} rows, and there are {len(tokens)}"
    row = next(i for i, (a, b) in enumerate(zip(known, tokens, strict=True)) if a != b)
    return f"by its moves a follower has {known[row]} for row {row}, which is {tokens[row]}"
