r"""DRY, "don't repeat yourself" (Weidmann 2024): penalizes tokens that prolong a repetition.

$$\text{logit}'(v) = \text{logit}(v) - \text{multiplier} \cdot
\text{base}^{\,n - \text{allowed\_length}}$$

if $n \ge \text{allowed\_length}$. $n$ is the length of the longest sequence that ends the row and
that $v$ has followed before, prompt included. A sequence never extends across a breaker, and a
token that contains a breaker is never penalized. As in llama.cpp, except that a text is a breaker
whichever tokens it is split into.
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
from gptk_plugins.processors._token_options import TokensOrText, check_vocabulary, validated

LARGEST = 1e38
"""The largest penalty: finite, so that a token stays possible if all others are masked."""

Ints = npt.NDArray[np.int64]
FORM = r"""a JSON list of texts or token ids, such as '["\n", ":", [198]]'"""


class DRY(gptk.LogitsProcessor):
    """Penalizes tokens that would prolong a repetition, exponentially in its length."""

    name = "dry"
    example = "multiplier=0.8"
    positional = "multiplier"
    other_names = {
        "dry_multiplier": "multiplier",
        "dry_base": "base",
        "dry_allowed_length": "allowed_length",
        "dry_penalty_last_n": "penalty_last_n",
    }

    multiplier: float = Field(
        0.8,
        ge=0,
        description="penalty of the token after a repetition of the allowed length; 0: none",
    )
    base: float = Field(1.75, ge=1, description="growth of the penalty with each further token")
    allowed_length: int = Field(
        2, ge=1, description="length of a repetition from which on the next token is penalized"
    )
    penalty_last_n: int = Field(
        -1, ge=-1, description="how many of the last tokens are searched; -1: all, 0: none"
    )
    sequence_breakers: tuple[TokensOrText, ...] = Field(
        ("\n", ":", '"', "*"),
        description="texts, token ids or lists of token ids that no repetition extends across, "
        "as a JSON list",
    )

    @field_validator("sequence_breakers", mode="wrap")
    @classmethod
    def _list(cls, value: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return validated(cls, "sequence_breakers", value, validate, FORM)

    def start(self, rows: gptk.Rows) -> "Repetitions":
        """Raises TokenizerError for texts as breakers if there is no tokenizer."""
        return Repetitions(self, _Breakers(self, rows), rows)

    def penalty(self, length: int) -> float:
        """The penalty of a token that would prolong a repetition of `length` tokens."""
        exponent = (length - self.allowed_length) * math.log(self.base)
        return min(self.multiplier * math.exp(min(exponent, math.log(LARGEST))), LARGEST)


class Repetitions(gptk.Follower):
    """For each position of each row, the longest common suffix of the tokens up to it and the row.

    A new token increases this length by 1 where the same token follows, and sets it to 0 elsewhere:
    time linear in the row's length, however much it repeats itself.
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
        penalized: list[tuple[int, int]] = []  # row and token
        penalties: list[float] = []
        for index, row in enumerate(self._rows):
            for token, length in row.repetitions(self._options).items():
                if not self._breakers.contained_in(token):
                    penalized.append((index, token))
                    penalties.append(self._options.penalty(length))
        if not penalized:
            return logits
        indices = torch.tensor(penalized, device=logits.device).T
        added = -torch.tensor(penalties, dtype=logits.dtype, device=logits.device)
        return logits.index_put((indices[0], indices[1]), added, accumulate=True)

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
    """A row's tokens and their repetitions. Immutable, so that copies of a row share it."""

    tokens: Ints
    common: Ints
    """For each position but the last: the length of the longest common suffix of the tokens up to
    it and all tokens."""
    breaks: npt.NDArray[np.bool_]
    """For each position: whether a breaker ends there."""

    @classmethod
    def of(cls, tokens: Sequence[int], breakers: "_Breakers") -> "_Row":
        breaks = [breakers.ends_at(tokens, position) for position in range(len(tokens))]
        return cls(
            np.array(tokens, dtype=np.int64), _common_suffixes(tokens), np.array(breaks, dtype=bool)
        )

    def extended(self, token: int, breakers: "_Breakers") -> "_Row":
        # Nothing comes before the first token: its suffix begins with length 0.
        longer = np.concatenate((np.zeros(min(1, len(self.tokens)), np.int64), self.common)) + 1
        tokens = np.append(self.tokens, token)
        last = tokens[-breakers.reach :].tolist()
        breaks = breakers.ends_at(last, len(last) - 1)
        return _Row(tokens, longer * (self.tokens == token), np.append(self.breaks, breaks))

    def shortened(self, count: int) -> "_Row":
        tokens = self.tokens[:-count]
        return replace(
            self,
            tokens=tokens,
            common=_common_suffixes(tokens.tolist()),
            breaks=self.breaks[:-count],
        )

    def repetitions(self, options: DRY) -> dict[int, int]:
        """The tokens that would prolong a repetition, each with the longest one's length."""
        end = len(self.tokens)
        window = end if options.penalty_last_n < 0 else min(end, options.penalty_last_n)
        broken = self.breaks[end - window :][::-1]
        limit = int(broken.argmax()) if broken.any() else window
        if limit < options.allowed_length:
            return {}
        # Only tokens within the window count.
        common = np.minimum(self.common[end - window :], np.arange(1, max(window, 1)))
        positions = np.flatnonzero(common >= options.allowed_length)
        longest: dict[int, int] = {}
        following = self.tokens[positions + (end - window + 1)].tolist()
        lengths = np.minimum(common[positions], limit).tolist()
        for token, length in zip(following, lengths, strict=True):
            longest[token] = max(longest.get(token, 0), length)
        return longest


def _common_suffixes(tokens: Sequence[int]) -> Ints:
    """For each position but the last: how long a suffix the tokens up to it share with all tokens.

    The Z-algorithm (Gusfield 1997, section 1.3) on the reversed tokens: linear time.
    """
    reverse = tokens[::-1]
    size = len(reverse)
    lengths = [0] * size
    left = right = 0  # reverse[left:right] is known to be a prefix of reverse
    for start in range(1, size):
        length = min(lengths[start - left], right - start) if start < right else 0
        while start + length < size and reverse[length] == reverse[start + length]:
            length += 1
        if start + length > right:
            left, right = start, start + length
        lengths[start] = length
    return np.array(lengths[:0:-1], dtype=np.int64)


class _Breakers:
    """The sequence breakers: texts and sequences of tokens."""

    def __init__(self, options: DRY, rows: gptk.Rows) -> None:
        self._texts = [
            breaker.encode("utf-8", "surrogatepass")
            for breaker in options.sequence_breakers
            if isinstance(breaker, str)
        ]
        self._sequences = [
            [breaker] if isinstance(breaker, int) else list(breaker)
            for breaker in options.sequence_breakers
            if not isinstance(breaker, str)
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
        """How many of the last tokens `ends_at` needs."""

    def contained_in(self, token: int) -> bool:
        """Whether a token is or contains a breaker."""
        spelled = self._bytes(token)
        return token in self._single or any(text in spelled for text in self._texts)

    def ends_at(self, tokens: Sequence[int], position: int) -> bool:
        """Whether a breaker ends within the token at a position."""
        if self.contained_in(tokens[position]):
            return True
        for sequence in self._sequences:
            if list(tokens[max(0, position + 1 - len(sequence)) : position + 1]) == sequence:
                return True
        if self._longest < 2:
            return False
        last = self._bytes(tokens[position])
        before = b""
        while position and len(before) < self._longest - 1:
            position -= 1
            before = self._bytes(tokens[position]) + before
        return any(
            text in before[len(before) - min(len(before), len(text) - 1) :] + last
            for text in self._texts
        )
