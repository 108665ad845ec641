"""Patterns that may take a time that grows exponentially with the text.

The engine of `tokenizers` tries all ways in which a pattern may match, some seconds for each place
of a text. This can only be many for a repetition in a repetition, as in `(a+)+`.
"""

import re
from typing import Any

from gptk.errors import TokenizerError


def check_repetitions(settings: Any) -> None:
    """Raise TokenizerError if a pattern in the settings of a `tokenizer.json` has a repetition, or
    an option (`?`), in a group that is repeated."""
    if isinstance(settings, list):
        for part in settings:
            check_repetitions(part)
    elif isinstance(settings, dict):
        for name, value in settings.items():
            if name == "Regex" and isinstance(value, str) and _is_nested(value):
                raise TokenizerError(f"the pattern {value[:40]!r} has a repetition in a repetition")
            check_repetitions(value)


def _is_nested(pattern: str) -> bool:
    repeats = [False]  # whether the pattern, and each group that is open, has a repetition
    classes = 0  # of characters, that are open
    group = False  # whether the part before is a group with a repetition
    before = ""
    for part in _PARTS.findall(pattern):
        closed = False
        if part in "[]":
            classes = max(classes + (1 if part == "[" else -1), 0)
        elif classes:
            pass
        elif part == "(":
            repeats.append(False)
        elif part == ")":
            closed = repeats.pop() if len(repeats) > 1 else False
            repeats[-1] |= closed
        elif _REPETITION.fullmatch(part) and before != "(":  # no (?: and the like
            if group and part != "?":
                return True
            repeats[-1] = True
        group, before = closed, part
    return False


_PARTS = re.compile(r"\\.|\{\d*,?\d*\}|.", re.DOTALL)
_REPETITION = re.compile(r"[*+?]|\{\d*,?\d*\}")
