"""Split patterns: the regular expressions by which tokenizers split a text into pieces.

Three engines read them: that of `tiktoken` (Rust's fancy-regex), Oniguruma, which `tokenizers`
uses, and Python's `regex`. They disagree in silence: `^` and `$` match at line ends in Oniguruma
only, `\\w` has other characters in each, `{1,3}+` is possessive in one and a repetition in another,
and `(?i:ss)` matches `ß` in one. So a pattern is parsed by the rules of the engine that it was
written for, and written anew for the engine that is to read it, in what means the same in all
three: characters, classes of them, `\\s`, `\\d`, `\\p{…}`, groups, alternatives, quantifiers,
lookaround. Whatever else there is in a pattern is refused by name.

The characters of a property are those of the Unicode version that an engine knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gptk.errors import TokenizerError
from gptk.text.pattern_parser import Parser
from gptk.text.pattern_tree import (
    ANY,
    Choice,
    Dialect,
    Look,
    Node,
    Repeat,
    Sequence,
    shortest,
    written,
)

MAX_LENGTH = 20_000
"""Characters of a pattern."""


@dataclass(frozen=True)
class SplitPattern:
    """A split pattern, parsed. Its matches are the pieces of a text."""

    tree: Node

    @classmethod
    def parse(cls, source: str, dialect: Literal["tiktoken", "oniguruma"]) -> "SplitPattern":
        """A pattern written for tiktoken or for Oniguruma.

        Raises TokenizerError that shows the first construct which is not known to mean the same in
        all engines, or if the pattern matches between characters, as `a*` does.
        """
        if len(source) > MAX_LENGTH:
            raise TokenizerError(f"its split pattern has more than {MAX_LENGTH:,} characters")
        tree = Parser(source, dialect).pattern()
        if shortest(tree) == 0:
            raise TokenizerError(f"its split pattern {source[:40]!r} matches between characters")
        return cls(tree)

    def written(self, dialect: Dialect) -> str:
        """The pattern for an engine."""
        return "".join(written(self.tree, dialect))

    def with_gaps(self) -> "SplitPattern":
        """The pattern whose matches are those of this one, and the text between them."""
        gap = Sequence((Look(self.tree, behind=False, negated=True), ANY))
        return SplitPattern(Choice((self.tree, Repeat(gap, 1, None, ""))))


_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# With digits split off first, a digit is the end of the text for GPT-2's pattern: whitespace before
# it stays whole.
_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s"
_SIGNS = r"\p{P}$+<=>\^~|"

SPLIT_PATTERNS: Mapping[str, str] = {
    "bytes": r"[\s\S]",
    "whole": r"[\s\S]+",
    # `++` (possessive) changes the time only: what follows such a run cannot begin within it.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s",
    "gpt2-digits": rf"\p{{N}}|{_DIGITS}",
    "gpt2-numbers": rf"\p{{N}}++|{_DIGITS}",
    "gpt2-tiktoken": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ),
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "llama3": _CL100K.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": _CL100K.replace("DIGITS", r"\p{N}"),
    "tekken": _CASED.replace("END", "") + r"|\p{N}" + _SPACES,
    "o200k": _CASED.replace("END", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _SPACES,
    # Four patterns of llama.cpp, each of which splits the pieces of the one before: signs, GPT-2's,
    # numbers, and three digits of ASCII.
    "llama.cpp": (
        rf"[{_SIGNS}]+|[0-9]{{3}}|(?:(?![0-9]{{3}})\p{{N}})+| ?\p{{L}}++"
        rf"| ?[^\s\p{{L}}\p{{N}}{_SIGNS}]++|\s+(?![^\s{_SIGNS}])|\s"
    ),
}
"""How well-known tokenizers split a text, by the model or library that did so first. The matches
of each cover any text."""
