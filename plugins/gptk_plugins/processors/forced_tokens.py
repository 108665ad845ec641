r"""Forced tokens: the new text has the given tokens at a given position.

$$\text{logit}'(v) = \begin{cases}
0 & \text{if } v \text{ is forced here} \\
-\infty & \text{otherwise}
\end{cases}$$

With eos_at, EOS is forced after that many new tokens. A token that an earlier processor has masked
stays masked. It does what transformers' ForcedBOS- and ForcedEOSTokenLogitsProcessor do.
"""

from collections.abc import Callable
from typing import Any

import pydantic
import torch
from pydantic import Field, field_validator
from torch import Tensor

import gptk
from gptk_plugins.processors._token_options import TokenId, check_vocabulary, token_ids, validated


class ForcedTokens(gptk.LogitsProcessor):
    """Forces a text at the beginning of the new text or later, and its end at a length."""

    name = "forced-tokens"
    example = 'text="Sure, "'
    positional = "text"

    text: str = Field("", description="the text to force")
    tokens: tuple[TokenId, ...] = Field((), description="or its token ids, as a JSON list")
    at: int = Field(0, ge=0, description="how many new tokens come before the forced ones")
    eos_at: int | None = Field(
        None, ge=0, description="how many new tokens a row gets before EOS is forced"
    )

    @field_validator("tokens", mode="wrap")
    @classmethod
    def _list(cls, value: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return validated(cls, "tokens", value, validate, "a JSON list such as '[464, 3290]'")

    def model_post_init(self, context: Any, /) -> None:
        n_sources = bool(self.text) + bool(self.tokens)
        if n_sources == 2:
            raise gptk.OptionError(f"{self.title()} takes text or tokens, not both")
        if not n_sources and self.eos_at is None:
            raise gptk.OptionError(f"{self.title()} needs text, tokens or eos_at")
        if not n_sources and self.at:
            raise gptk.OptionError(f"{self.title()}: at={self.at} says where text or tokens begin")

    def start(self, rows: gptk.Rows) -> Callable[[Tensor, gptk.Rows], Tensor]:
        """Raises TokenizerError (text, no tokenizer) or OptionError (eos_at, no EOS)."""
        forced = token_ids(self.text, self, rows) if self.text else list(self.tokens)
        allowed = {self.at + index: [token] for index, token in enumerate(forced)}
        if self.eos_at is not None:
            if not rows.eos:
                raise gptk.OptionError(
                    f"{self.title()}: eos_at={self.eos_at} needs an end-of-text token; the model "
                    "has none, or it is to be ignored"
                )
            if self.eos_at in allowed:
                raise gptk.OptionError(
                    f"{self.title()}: eos_at={self.eos_at} is within the forced tokens, which "
                    f"take positions {self.at} to {self.at + len(forced) - 1}"
                )
            allowed[self.eos_at] = list(rows.eos)
        largest = max(token for tokens in allowed.values() for token in tokens)

        def process(logits: Tensor, rows: gptk.Rows) -> Tensor:
            check_vocabulary(largest, logits.shape[-1], self)
            positions = [
                length - start
                for length, start in zip(rows.lengths, rows.prompt_lengths, strict=True)
            ]
            if not any(position in allowed for position in positions):
                return logits
            logits = logits.clone()
            for row, position in enumerate(positions):
                if position in allowed:
                    kept = logits[row, allowed[position]]
                    logits[row] = -torch.inf
                    logits[row, allowed[position]] = torch.where(kept == -torch.inf, kept, 0)
            return logits

        return process
