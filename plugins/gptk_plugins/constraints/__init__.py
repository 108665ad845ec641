"""Constrained decoding: the new text is always the beginning of a valid text."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.constraints.choice import Choice as Choice
    from gptk_plugins.constraints.grammar import Grammar as Grammar
    from gptk_plugins.constraints.json_schema import JsonSchema as JsonSchema
    from gptk_plugins.constraints.regex import Regex as Regex

_HOMES = {
    "Choice": "choice",
    "Grammar": "grammar",
    "JsonSchema": "json_schema",
    "Regex": "regex",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
