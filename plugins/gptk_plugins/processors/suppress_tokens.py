r"""Suppressed tokens: the given tokens are masked, at every step or only at the first.

$$\text{logit}'(v) = -\infty \quad\text{for the given } v$$
"""

from collections.abc import Callable
from typing import Any

import pydantic
import torch
from pydantic import Field, field_validator
from torch import Tensor

import gptk
from gptk_plugins.processors._token_options import (
    Text,
    TokenId,
    check_vocabulary,
    single_token_id,
    validated,
)


class SuppressTokens(gptk.LogitsProcessor):
    """Bans given tokens, at every step or only as the first new token."""

    name = "suppress-tokens"
    example = 'tokens=[1, "!"]'
    positional = "tokens"

    tokens: tuple[TokenId | Text, ...] = Field(
        description="token ids, or texts that are one token, as a JSON list"
    )
    begin: bool = Field(False, description="ban them only as the first new token")

    @field_validator("tokens", mode="wrap")
    @classmethod
    def _list(cls, value: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return validated(cls, "tokens", value, validate, """a JSON list such as '[1, " the"]'""")

    def start(self, rows: gptk.Rows) -> Callable[[Tensor, gptk.Rows], Tensor]:
        """Raises TokenizerError or OptionError for a text that is not a single token."""
        ids = [single_token_id(token, self, rows, instead="bad-words") for token in self.tokens]
        index = torch.tensor(ids, dtype=torch.int64, device=rows.tokens.device)

        def process(logits: Tensor, rows: gptk.Rows) -> Tensor:
            check_vocabulary(max(ids, default=0), logits.shape[-1], self)
            if not self.begin:
                return logits.index_fill(1, index, -torch.inf)
            begins = torch.tensor(rows.lengths) == torch.tensor(rows.prompt_lengths)
            if not begins.any():
                return logits
            suppressed = logits.index_fill(1, index, -torch.inf)
            return torch.where(begins.to(logits.device)[:, None], suppressed, logits)

        return process
