r"""Bad words: no token completes one of the given sequences.

$$\text{logit}'(v) = -\infty$$

if the row followed by $v$ ends with a given sequence.

A sequence of tokens is banned, not a spelling: the model may still write a word with other tokens,
and a token that is a bad word is also banned where it would end another word. Tokenizers split
"word" and " word" differently, so a text is banned both as it is and after a space; a text that
begins with a space or line break is banned only as it is.
"""

import math
from typing import Any

import pydantic
from pydantic import Field, field_validator

import gptk
from gptk_plugins.processors._token_options import TokensOrText, token_ids, validated
from gptk_plugins.processors.sequence_bias import Biases

FORM = """a JSON list of texts or lists of token ids, such as '["foo", [464, 3290]]'"""


class BadWords(gptk.LogitsProcessor):
    """Bans tokens that would complete one of the given words or token sequences."""

    name = "bad-words"
    example = 'words=["red", "navy blue"]'
    positional = "words"
    other_names = {"bad_words_ids": "words"}

    words: tuple[TokensOrText, ...] = Field(
        description="texts, banned with and without a space before them, or lists of token ids, "
        "as a JSON list"
    )

    @field_validator("words", mode="wrap")
    @classmethod
    def _list(cls, value: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
        return validated(cls, "words", value, validate, FORM)

    def start(self, rows: gptk.Rows) -> Biases:
        """Raises TokenizerError for texts if there is no tokenizer."""
        sequences = [
            tuple(token_ids(form, self, rows)) for word in self.words for form in self._forms(word)
        ]
        # EOS alone is not banned, or rows would never end; min-new-tokens delays EOS.
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
