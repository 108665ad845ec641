r"""Regular expressions: the new text as a whole matches the pattern.

$$\text{valid}(\text{text}) \iff \text{text} \in L(\text{pattern})$$

$L$ are the texts that the pattern matches from the first character to the last. The syntax is that
of the Rust crate regex: no look-around, no backreferences. `\d` means the digits 0 to 9, `.` any
character but a newline.
"""

from pydantic import Field

import gptk
from gptk_plugins.constraints._matcher import Constraint, llguidance


class Regex(Constraint):
    """The new text as a whole matches a regular expression."""

    name = "regex"
    example = 'pattern="[0-9]{3}-[0-9]{4}"'
    positional = "pattern"
    other_names = {"guided_regex": "pattern"}

    pattern: str = Field(description="no look-around, no backreferences")

    def grammar_text(self) -> str:
        return f"start: /{llguidance().regex_to_lark(self.pattern)}/"

    def subject(self) -> str:
        return f"pattern {gptk.plugins.shown(self.pattern)}"
