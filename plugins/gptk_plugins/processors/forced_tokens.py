"""Forced tokens: the new tokens at given places are the given ones.

    logit'(v) = 0 for the token due at this place, -inf for all others

With eos_at, EOS is due after so many new tokens. A token that something before has taken out
stays out. It does what transformers' ForcedBOS- and ForcedEOSTokenLogitsProcessor do.
"""

from collections.abc import Callable
from typing import Any

import pydantic
import torch
from pydantic import Field, field_validator
from torch import Tensor

import gptk
from gptk_plugins.processors._words import Token, check_vocabulary, explained, ids_of


class ForcedTokens(gptk.LogitsProcessor):
    """Makes the new text begin with, or have at a place, a given text, and end at a length."""

    name = "forced-tokens"
    example = 'text="Sure, "'

    text: str = Field("", description="the text to force")
    tokens: tuple[Token, ...] = Field((), description="or its token ids, as a JSON list")
    at: int = Field(0, ge=0, description="how many new tokens come before it")
    eos_at: int | None = Field(
        None, ge=0, description="how many new tokens a row gets before EOS is forced"
    )

    @field_validator("tokens", mode="wrap")
    @classmethod
    def _list(cls, given: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return explained(cls, "tokens", given, validate, "a JSON list such as '[464, 3290]'")

    def model_post_init(self, context: Any, /) -> None:
        given = bool(self.text) + bool(self.tokens)
        if given == 2:
            raise gptk.OptionError(f"{self.title()} takes text or tokens, not both")
        if not given and self.eos_at is None:
            raise gptk.OptionError(f"{self.title()} needs text, tokens or eos_at")
        if not given and self.at:
            raise gptk.OptionError(f"{self.title()}: at={self.at} says where text or tokens begin")

    def start(self, rows: gptk.Rows) -> Callable[[Tensor, gptk.Rows], Tensor]:
        """Raises TokenizerError for a text, or OptionError for EOS, where there is none."""
        forced = ids_of(self.text, self, rows) if self.text else list(self.tokens)
        due = {self.at + place: [token] for place, token in enumerate(forced)}
        if self.eos_at is not None:
            if not rows.eos:
                raise gptk.OptionError(
                    f"{self.title()}: eos_at={self.eos_at} needs an end-of-text token; the model "
                    "has none, or it is to be ignored"
                )
            if self.eos_at in due:
                raise gptk.OptionError(
                    f"{self.title()}: eos_at={self.eos_at} is within the forced tokens, which "
                    f"take places {self.at} to {self.at + len(forced) - 1}"
                )
            due[self.eos_at] = list(rows.eos)
        largest = max(token for tokens in due.values() for token in tokens)

        def process(logits: Tensor, rows: gptk.Rows) -> Tensor:
            check_vocabulary(largest, logits.shape[-1], self)
            new = [
                length - start
                for length, start in zip(rows.lengths, rows.prompt_lengths, strict=True)
            ]
            if not any(place in due for place in new):
                return logits
            logits = logits.clone()
            for row, place in enumerate(new):
                if place in due:
                    kept = logits[row, due[place]]
                    logits[row] = -torch.inf
                    logits[row, due[place]] = torch.where(kept == -torch.inf, kept, 0)
            return logits

        return process
