r"""Context-free grammars in Lark's notation: the new text is one that `start` derives.

$$\text{valid}(\text{text}) \iff \text{start} \Rightarrow^{*} \text{text}$$

llguidance parses with Earley's algorithm (1970) over a lexer of the terminals, and has its own
dialect: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. A special token of
the tokenizer can be asked for by name, `<|im_start|>`, and JSON by `%json {schema}`.
"""

import re

from pydantic import Field

from gptk_plugins.constraints._matcher import Constraint, read_option


class Grammar(Constraint):
    """The new text is one that a Lark grammar derives."""

    name = "grammar"
    example = """grammar='start: "yes" | "no" " way"?'"""
    shows_positions = True

    grammar: str = Field(description="a Lark grammar: a file, or the text itself")

    def grammar_text(self) -> str:
        form = "a Lark grammar, which has a rule `start: …`"
        return read_option(self.grammar, literal=self._is_literal(), form=form)

    def subject(self) -> str:
        return "grammar" if self._is_literal() else repr(self.grammar)

    def _is_literal(self) -> bool:
        return re.search(r"^\s*start\b[^/\\]*:", self.grammar, re.MULTILINE) is not None
