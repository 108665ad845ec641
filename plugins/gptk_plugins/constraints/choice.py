r"""Choice: the new text is one of a list of texts.

$$\text{valid}(\text{text}) \iff \text{text} \in \text{choices}$$
"""

import json
from typing import Any

from pydantic import Field, field_validator

import gptk
from gptk_plugins.constraints._matcher import Constraint

_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x20), 0x7F)}


class Choice(Constraint):
    """The new text is one of the given texts."""

    name = "choice"
    example = 'choices=["yes", "no"]'
    positional = "choices"
    other_names = {"guided_choice": "choices"}

    choices: tuple[str, ...] = Field(min_length=1, description="the texts, as a JSON list")

    @field_validator("choices", mode="before")
    @classmethod
    def _list(cls, choices: Any) -> Any:
        if isinstance(choices, str):
            raise gptk.OptionError(
                f"""{cls.title()}: choices is a JSON list, '["yes", "no"]', not """
                + gptk.plugins.shown(choices)
            )
        return choices

    def grammar_text(self) -> str:
        # A single terminal, so that the lexer has a single lexeme. llguidance's strings are JSON's,
        # but with U+007F escaped.
        texts = [json.dumps(text, ensure_ascii=False).translate(_ESCAPED) for text in self.choices]
        return f"start: CHOICE\nCHOICE: {' | '.join(texts)}"

    def subject(self) -> str:
        return "choices"
