r"""Logit bias (OpenAI's API): a number added to the logits of the given tokens.

$$\text{logit}'(v) = \text{logit}(v) + \text{bias}(v)$$
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
    as_pairs,
    check_vocabulary,
    single_token_id,
    validated,
)

FORM = """a JSON object such as '{"50256": -100, " the": 2.5}' (digits name a token id)"""


class LogitBias(gptk.LogitsProcessor):
    """Adds to the logits of given tokens: about -100 bans one, 100 forces it."""

    name = "logit-bias"
    example = 'bias={"11": -100, "!": 2.5}'
    positional = "bias"

    bias: tuple[tuple[TokenId | Text, float], ...] = Field(
        description="what to add by token id, or by text that is one token, as a JSON object; "
        "in a list of pairs, texts of digits are texts and not ids"
    )

    @field_validator("bias", mode="wrap")
    @classmethod
    def _pairs(cls, value: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return validated(cls, "bias", as_pairs(value), validate, FORM)

    def start(self, rows: gptk.Rows) -> Callable[[Tensor, gptk.Rows], Tensor]:
        """Raises TokenizerError or OptionError for a text that is not a single token."""
        biases = {
            single_token_id(token, self, rows, instead="sequence-bias"): bias
            for token, bias in self.bias
        }
        device = rows.tokens.device
        index = torch.tensor(list(biases), dtype=torch.int64, device=device)
        added = torch.tensor(list(biases.values()), dtype=torch.float32, device=device)

        def process(logits: Tensor, rows: gptk.Rows) -> Tensor:
            check_vocabulary(max(biases, default=0), logits.shape[-1], self)
            return logits.index_add(1, index, added.expand(len(logits), -1))

        return process
