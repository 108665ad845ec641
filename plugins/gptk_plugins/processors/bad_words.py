"""Bad words: the logit of a token that would complete one of the given sequences is -inf.

A sequence of tokens is banned, not a spelling: the model may still write a word in other pieces,
and a piece that is a bad word is banned at the end of other words, too. A text is banned as its
tokenizer cuts it, both as it is and after a space, as tokenizers cut " word" and "word"
differently; one that begins with a space or line break only as it is.
"""

import math
from typing import Any

import pydantic
from pydantic import Field, field_validator

import gptk
from gptk_plugins.processors._words import Word, explained, ids_of
from gptk_plugins.processors.sequence_bias import Biases

FORM = """a JSON list of texts or lists of token ids, such as '["foo", [464, 3290]]'"""


class BadWords(gptk.LogitsProcessor):
    """Takes out tokens that would complete one of the given words or token sequences."""

    name = "bad-words"
    example = 'words=["red", "navy blue"]'

    words: tuple[Word, ...] = Field(
        description="texts, banned with and without a space before them, or lists of token ids, "
        "as a JSON list"
    )

    @field_validator("words", mode="wrap")
    @classmethod
    def _list(cls, given: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return explained(cls, "words", given, validate, FORM)

    def start(self, rows: gptk.Rows) -> Biases:
        """Raises TokenizerError for texts where there is no tokenizer."""
        sequences = [
            tuple(ids_of(form, self, rows)) for word in self.words for form in self._forms(word)
        ]
        # Without EOS a row would only end for want of room: min-new-tokens is there for that.
        ends = {(token,) for token in rows.eos}
        return Biases(
            {sequence: -math.inf for sequence in sequences if sequence not in ends},
            self,
            rows.tokens.device,
        )

    def _forms(self, word: int | str | tuple[int, ...]) -> list[int | str | tuple[int, ...]]:
        if isinstance(word, str) and not word[0].isspace():
            return [word, f" {word}"]
        return [word]
