"""DRY, "don't repeat yourself" (Weidmann 2024): the longer a repetition, the less it may go on.

    logit(v) - multiplier · base^(n - allowed_length), where n ≥ allowed_length

n is the length of the longest sequence that ends the row and that v has followed before, prompt
included. A sequence does not reach back across a breaker, and a token that has one within is never
penalized. As in llama.cpp, but a text is a breaker however it is cut into tokens.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
import torch
from pydantic import Field, field_validator
from torch import Tensor

import gptk
from gptk_plugins.processors._words import Word, check_vocabulary, explained

LARGEST = 1e38
"""No penalty is larger, so that a token stays possible where others are taken out."""

Ints = npt.NDArray[np.int64]
FORM = r"""a JSON list of texts or token ids, such as '["\n", ":", [198]]'"""


class DRY(gptk.LogitsProcessor):
    """Penalizes tokens that would prolong a repetition, exponentially in its length."""

    name = "dry"
    example = "multiplier=0.8"

    multiplier: float = Field(
        0.8,
        ge=0,
        description="the penalty on what follows a repetition of the allowed length; 0: none",
    )
    base: float = Field(1.75, ge=1, description="growth of the penalty with each token more")
    allowed_length: int = Field(
        2, ge=1, description="how many tokens in a row may come again without a penalty"
    )
    penalty_last_n: int = Field(
        -1, ge=-1, description="how many of the last tokens are searched; -1: all, 0: none"
    )
    sequence_breakers: tuple[Word, ...] = Field(
        ("\n", ":", '"', "*"),
        description="texts, token ids or lists of token ids across which nothing is a repetition, "
        "as a JSON list",
    )

    @field_validator("sequence_breakers", mode="wrap")
    @classmethod
    def _list(cls, given: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return explained(cls, "sequence_breakers", given, validate, FORM)

    def start(self, rows: gptk.Rows) -> "Repetitions":
        """Raises TokenizerError for texts as breakers where there is no tokenizer."""
        return Repetitions(self, _Breakers(self, rows), rows)

    def penalty(self, length: int) -> float:
        """Of a token that goes on with a repetition of `length` tokens."""
        exponent = (length - self.allowed_length) * math.log(self.base)
        return min(self.multiplier * math.exp(min(exponent, math.log(LARGEST))), LARGEST)


class Repetitions(gptk.Follower):
    """For each place of each row how much of what ends the row ends there, too.

    A new token makes that longer by one where it is the next, and 0 elsewhere: time linear in the
    row's length, however much it repeats itself.
    """

    def __init__(self, options: DRY, breakers: "_Breakers", rows: gptk.Rows) -> None:
        self._options = options
        self._breakers = breakers
        self._rows = [
            _Row.of(rows.tokens[row, :length].tolist(), breakers)
            for row, length in enumerate(rows.lengths)
        ]

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        check_vocabulary(self._breakers.largest, logits.shape[-1], self._options)
        if not self._options.multiplier:
            return logits
        places: list[tuple[int, int]] = []
        penalties: list[float] = []
        for index, row in enumerate(self._rows):
            for token, length in row.repetitions(self._options).items():
                if not self._breakers.within(token):
                    places.append((index, token))
                    penalties.append(self._options.penalty(length))
        if not places:
            return logits
        at = torch.tensor(places, device=logits.device).T
        added = -torch.tensor(penalties, dtype=logits.dtype, device=logits.device)
        return logits.index_put((at[0], at[1]), added, accumulate=True)

    def extend(self, tokens: Tensor) -> None:
        self._rows = [
            functools.reduce(lambda row, token: row.extended(token, self._breakers), new, row)
            for row, new in zip(self._rows, tokens.tolist(), strict=True)
        ]

    def select(self, parents: Sequence[int]) -> None:
        self._rows = [self._rows[parent] for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self._rows = [
            row.shortened(count) if count else row
            for row, count in zip(self._rows, counts, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Row:
    """A row's tokens and what they repeat. It is never changed, so that copies may share it."""

    tokens: Ints
    common: Ints
    """For each place but the last: how many tokens up to it are those that end the row."""
    breaks: npt.NDArray[np.bool_]
    """For each place whether a breaker is complete with it."""

    @classmethod
    def of(cls, tokens: Sequence[int], breakers: "_Breakers") -> "_Row":
        breaks = [breakers.complete_at(tokens, place) for place in range(len(tokens))]
        return cls(
            np.array(tokens, dtype=np.int64), _common_suffixes(tokens), np.array(breaks, dtype=bool)
        )

    def extended(self, token: int, breakers: "_Breakers") -> "_Row":
        # Where nothing came before, nothing was common.
        longer = np.concatenate((np.zeros(min(1, len(self.tokens)), np.int64), self.common)) + 1
        tokens = np.append(self.tokens, token)
        last = tokens[-breakers.reach :].tolist()
        complete = breakers.complete_at(last, len(last) - 1)
        return _Row(tokens, longer * (self.tokens == token), np.append(self.breaks, complete))

    def shortened(self, count: int) -> "_Row":
        tokens = self.tokens[:-count]
        return replace(
            self,
            tokens=tokens,
            common=_common_suffixes(tokens.tolist()),
            breaks=self.breaks[:-count],
        )

    def repetitions(self, options: DRY) -> dict[int, int]:
        """The tokens that go on with a repetition, and the longest that each goes on with."""
        end = len(self.tokens)
        window = end if options.penalty_last_n < 0 else min(end, options.penalty_last_n)
        broken = self.breaks[end - window :][::-1]
        limit = int(broken.argmax()) if broken.any() else window
        if limit < options.allowed_length:
            return {}
        # What is common may not begin before the window either.
        common = np.minimum(self.common[end - window :], np.arange(1, max(window, 1)))
        places = np.flatnonzero(common >= options.allowed_length)
        longest: dict[int, int] = {}
        following = self.tokens[places + (end - window + 1)].tolist()
        lengths = np.minimum(common[places], limit).tolist()
        for token, length in zip(following, lengths, strict=True):
            longest[token] = max(longest.get(token, 0), length)
        return longest


def _common_suffixes(tokens: Sequence[int]) -> Ints:
    """For each place but the last: how many tokens up to it are those that end the whole.

    The Z-algorithm (Gusfield 1997, section 1.3) from the end: linear in the number of tokens.
    """
    back = tokens[::-1]
    size = len(back)
    lengths = [0] * size
    left = right = 0  # back[left:right] is known to be a beginning of back
    for place in range(1, size):
        length = min(lengths[place - left], right - place) if place < right else 0
        while place + length < size and back[length] == back[place + length]:
            length += 1
        if place + length > right:
            left, right = place, place + length
        lengths[place] = length
    return np.array(lengths[:0:-1], dtype=np.int64)


class _Breakers:
    """Texts and sequences of tokens that end what can be repeated."""

    def __init__(self, options: DRY, rows: gptk.Rows) -> None:
        self._texts = [
            word.encode("utf-8", "surrogatepass")
            for word in options.sequence_breakers
            if isinstance(word, str)
        ]
        self._sequences = [
            [word] if isinstance(word, int) else list(word)
            for word in options.sequence_breakers
            if not isinstance(word, str)
        ]
        self._single = {sequence[0] for sequence in self._sequences if len(sequence) == 1}
        self.largest = max((max(sequence) for sequence in self._sequences), default=0)
        self._bytes: Callable[[int], bytes] = lambda token: b""
        if self._texts:
            if rows.tokenizer is None:
                raise gptk.TokenizerError(
                    f"{options.title()} needs the text of tokens for its sequence breakers, and "
                    "the model comes without a tokenizer; name one, such as --tokenizer gpt2, or "
                    'give token ids: sequence_breakers="[]"'
                )
            self._bytes = rows.tokenizer.token_bytes
        self._longest = max(map(len, self._texts), default=0)
        self.reach = max([self._longest, 1, *map(len, self._sequences)])
        """How many of the last tokens decide whether a breaker is complete."""

    def within(self, token: int) -> bool:
        """Whether a token is a breaker by itself."""
        own = self._bytes(token)
        return token in self._single or any(text in own for text in self._texts)

    def complete_at(self, tokens: Sequence[int], place: int) -> bool:
        """Whether a breaker is complete with the token at a place, and was not before."""
        if self.within(tokens[place]):
            return True
        for sequence in self._sequences:
            if list(tokens[max(0, place + 1 - len(sequence)) : place + 1]) == sequence:
                return True
        if self._longest < 2:
            return False
        own = self._bytes(tokens[place])
        before = b""
        while place and len(before) < self._longest - 1:
            place -= 1
            before = self._bytes(tokens[place]) + before
        return any(
            text in before[len(before) - min(len(before), len(text) - 1) :] + own
            for text in self._texts
        )
