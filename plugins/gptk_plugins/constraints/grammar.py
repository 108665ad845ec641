r"""Context-free grammars in Lark's notation: the new text is one that `start` derives.

$$\text{valid}(\text{text}) \iff \text{start} \Rightarrow^{*} \text{text}$$

llguidance parses with Earley's algorithm (1970) over a lexer of the terminals, and has its own
dialect: <https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md>. A special token of
the tokenizer can be asked for by name, `<|im_start|>`, and JSON by `%json {schema}`.
"""

import json
import re
from collections.abc import Iterator

from pydantic import Field

from gptk_plugins.constraints import _schema
from gptk_plugins.constraints._matcher import Constraint


class Grammar(Constraint):
    """The new text is one that a Lark grammar derives."""

    name = "grammar"
    example = r'grammar="start: \"yes\" | \"no\" \" way\"?"'
    positional = "grammar"
    other_names = {"guided_grammar": "grammar"}
    shows_positions = True

    grammar: str = Field(description="a Lark grammar: a file, or the text itself")

    def grammar_text(self) -> str:
        form = "a Lark grammar, which has a rule `start: …`"
        text = self._read(self.grammar, literal=self._is_literal(), form=form)
        if text.lstrip().startswith("{"):
            raise ValueError("is JSON, and not a Lark grammar")
        return _schema.replace_json(text, _schemas(text))

    def is_plain(self, grammar: str) -> bool:
        return len(grammar) <= 5000 and "%json" not in grammar

    def subject(self) -> str:
        return "grammar" if self._is_literal() else repr(self.grammar)

    def _is_literal(self) -> bool:
        return re.search(r"^\s*start\b[^/\\]*:", self.grammar, re.MULTILINE) is not None


# What a schema is not looked for in: texts, regular expressions and comments.
_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/|(?:#|//)[^\n]*|(%json)\s*', re.DOTALL)
_JSON = json.JSONDecoder(strict=False)


def _schemas(grammar: str) -> Iterator[tuple[int, int]]:
    """Where each JSON schema in a grammar begins and ends."""
    position = 0
    while token := _TOKEN.search(grammar, position):
        position = token.end()
        if token[1]:
            try:
                position = _JSON.raw_decode(grammar, position)[1]
            except RecursionError:
                raise ValueError("a schema in it is nested too deeply") from None
            except ValueError:
                raise ValueError(
                    f"what follows %json is not JSON: {grammar[position:][:40]!r}"
                ) from None
            yield token.end(), position
