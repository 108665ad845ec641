r"""Sequence bias: a number added to the logit of a token that would complete a given sequence.

$$\text{logit}'(v) = \text{logit}(v) + \sum_{s \text{ completed by } v} \text{bias}(s)$$

The bias of a single token applies at every step. A sequence may begin in the prompt. It is
transformers' SequenceBiasLogitsProcessor.
"""

from collections.abc import Mapping
from typing import Any

import pydantic
import torch
from pydantic import Field, field_validator
from torch import Tensor

import gptk
from gptk_plugins.processors._token_options import (
    TokensOrText,
    as_pairs,
    check_vocabulary,
    token_ids,
    validated,
)

FORM = """a JSON object such as '{" New York": -2}', or a list of pairs '[[[464, 3290], 1.5]]'"""


class SequenceBias(gptk.LogitsProcessor):
    """Adds to the logit of a token that would complete one of the given sequences."""

    name = "sequence-bias"
    example = 'biases={" purple": 4, " sky blue": 2.5}'
    positional = "biases"

    biases: tuple[tuple[TokensOrText, float], ...] = Field(
        description="what to add by text (with its leading space) as a JSON object, or as a list "
        "of pairs of a list of token ids (or a text) and a number"
    )

    @field_validator("biases", mode="wrap")
    @classmethod
    def _pairs(cls, value: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return validated(cls, "biases", as_pairs(value), validate, FORM)

    def start(self, rows: gptk.Rows) -> "Biases":
        """Raises TokenizerError for texts if there is no tokenizer."""
        biases = {tuple(token_ids(tokens, self, rows)): bias for tokens, bias in self.biases}
        return Biases(biases, self, rows.tokens.device)


class Biases:
    """Called, it adds the biases of token sequences to the logits of their last tokens.

    Sequences are looked up by the tokens before the last, once for each distinct length: the time
    depends neither on the number of sequences nor on the length of the row.
    """

    def __init__(
        self, biases: Mapping[tuple[int, ...], float], plugin: gptk.Plugin, device: torch.device
    ) -> None:
        self._plugin = plugin
        self._largest = max((token for sequence in biases for token in sequence), default=0)
        single = {sequence[0]: bias for sequence, bias in biases.items() if len(sequence) == 1}
        self._index = torch.tensor(list(single), dtype=torch.int64, device=device)
        self._added = torch.tensor(list(single.values()), dtype=torch.float32, device=device)
        self._after: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for (*before, last), bias in biases.items():
            if before:
                self._after.setdefault(tuple(before), []).append((last, bias))
        self._widths = sorted({len(before) for before in self._after})

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        check_vocabulary(self._largest, logits.shape[-1], self._plugin)
        biased: list[tuple[int, int]] = []  # row and token
        added: list[float] = []
        for row in range(len(rows) if self._widths else 0):
            end = rows.lengths[row]
            tail = rows.tokens[row, max(0, end - self._widths[-1]) : end].tolist()
            for width in self._widths:
                if width <= len(tail):
                    for token, bias in self._after.get(tuple(tail[len(tail) - width :]), ()):
                        biased.append((row, token))
                        added.append(bias)
        if len(self._index):
            logits = logits.index_add(1, self._index, self._added.expand(len(logits), -1))
        if biased:
            indices = torch.tensor(biased, device=logits.device).T
            biases = torch.tensor(added, device=logits.device)
            logits = logits.index_put((indices[0], indices[1]), biases, accumulate=True)
        return logits
