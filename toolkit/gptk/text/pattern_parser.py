"""Reading a split pattern, as written for tiktoken or for Oniguruma, into its parts.

What is not known to mean the same in all engines is refused, see gptk.text.patterns.
"""

from collections.abc import Callable
from typing import Literal

from gptk.errors import TokenizerError
from gptk.text.pattern_tree import (
    CONTROLS,
    SHORT,
    Atomic,
    Characters,
    Choice,
    Edge,
    Look,
    Node,
    Repeat,
    Sequence,
    inside,
)

MAX_DEPTH = 40
"""Groups within groups."""
MAX_REPEAT = 1000
"""The largest number in {…}."""


class Parser:
    def __init__(self, source: str, dialect: Literal["tiktoken", "oniguruma"]) -> None:
        self._source = source
        self._onig = dialect == "oniguruma"
        self._word, self._bare_word = _WORD[dialect], _BARE_WORD[dialect]
        self._at = 0
        self._depth = 0
        self._ignore_case = False

    def pattern(self) -> Node:
        node = self._choice()
        if self._at < len(self._source):  # a ) without its (
            raise self._refusal()
        return node

    def _refusal(self, start: int | None = None) -> TokenizerError:
        start = self._at if start is None else start
        shown = self._source[start : start + 12]
        what = repr(shown) if shown else "an unclosed ( or ["
        return TokenizerError(
            f"its split pattern has {what}, which is not known to mean the same in all engines"
        )

    def _next(self, text: str) -> bool:
        """Whether the source goes on with a text; if so, it is read."""
        found = self._source.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _take(self) -> str:
        if self._at >= len(self._source):
            raise self._refusal()
        self._at += 1
        return self._source[self._at - 1]

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _choice(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TokenizerError(f"its split pattern has more than {MAX_DEPTH} nested groups")
        parts = [self._sequence()]
        while self._next("|"):
            parts.append(self._sequence())
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self) -> Node:
        start, parts = self._at, []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated())
        if self._ignore_case and self._onig and any(map(_joins, parts, parts[1:])):
            raise self._refusal(start)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self) -> Node:
        start = self._at
        node = self._part()
        count = self._count()
        if count is None:
            return node
        (least, most), braces = count
        mode: Literal["", "?", "+"] = "?" if self._next("?") else "+" if self._next("+") else ""
        exact = braces and least == most
        if (
            isinstance(node, Look | Edge)
            or max(least, most or 0) > MAX_REPEAT
            or (mode == "?" and exact and self._onig)  # there {2}? is an optional {2}
            or self._count() is not None  # a quantifier of a quantifier
        ):
            raise self._refusal(start)
        if mode == "+" and braces and self._onig:  # there {1,3}+ is a repetition of {1,3}
            return Repeat(Repeat(node, least, most, ""), 1, None, "")
        return Repeat(node, least, most, mode)

    def _count(self) -> tuple[tuple[int, int | None], bool] | None:
        """The numbers of a quantifier, and whether it is in braces."""
        for (least, most), sign in SHORT.items():
            if self._next(sign):
                return (least, most), False
        if self._peek() != "{":
            return None
        start = self._at
        end = self._source.find("}", start)
        inner = self._source[start + 1 : end] if end > 0 else ""
        first, comma, last = inner.partition(",")
        numbers = [text for text in (first, last) if text]
        if not first or not all(text.isascii() and text.isdigit() for text in numbers):
            raise self._refusal()
        if any(len(text) > 9 for text in numbers):
            raise self._refusal()
        self._at = end + 1
        least = int(first)
        most = (int(last) if last else None) if comma else least
        if most is not None and most < max(least, 1):
            raise self._refusal(start)
        return (least, most), True

    def _part(self) -> Node:
        start = self._at
        character = self._take()
        match character:
            case "(":
                return self._parenthesis(start)
            case "[":
                return self._brackets(start)
            case ".":
                return Characters((r"\n",), negated=True)
            case "^":
                return _LINE_START if self._onig else _AT_START
            case "$":
                return _LINE_END if self._onig else _AT_END
            case "\\":
                return self._escape(start)
            case "*" | "+" | "?" | "{" | "}" | "]":
                raise self._refusal(start)
        return self._literal(character, start)

    def _parenthesis(self, start: int) -> Node:
        make: Callable[[Node], Node] = lambda node: node  # noqa: E731
        before = self._ignore_case
        if self._next("?"):
            for opening, made in _OPENINGS.items():
                if self._next(opening):
                    make = made
                    break
            else:
                if not self._next("i:"):
                    raise self._refusal(start)
                self._ignore_case = True
        node = self._choice()
        if not self._next(")"):
            raise self._refusal(len(self._source))
        if self._onig and before != self._ignore_case and _nested(node):
            raise self._refusal(start)  # a ligature may stand across the inner groups
        self._ignore_case = before
        return make(node)

    def _literal(self, character: str, start: int) -> Characters:
        if not self._ignore_case or not (character.isalpha() or character.casefold() != character):
            return Characters((inside(character),))
        if not character.isascii():
            raise self._refusal(start)
        lower = character.lower()
        folded = _FOLDED.get(lower, "")
        return Characters((lower, lower.upper(), *folded))

    def _escape(self, start: int) -> Node:
        letter = self._take()
        if letter in "wW":
            return Characters(self._bare_word, negated=letter == "W")
        if letter in "bB" and not self._onig:
            return Edge(letter)  # type: ignore[arg-type]
        if letter in "Az":
            return _AT_START if letter == "A" else _AT_END
        item = self._escaped(letter, start)
        if len(item) == 1:
            return self._literal(item, start)
        return Characters((item,))

    def _escaped(self, letter: str, start: int) -> str:
        """What an escape stands for: a character, or a class such as \\s."""
        if letter in "sSdD":
            return f"\\{letter}"
        if letter in "pP":
            return self._property(letter, start)
        if letter in CONTROLS:
            return CONTROLS[letter]
        if letter in _CODES:
            return self._code(_CODES[letter], start)
        if letter.isascii() and not letter.isalnum() and letter.isprintable() and letter != " ":
            return letter
        raise self._refusal(start)

    def _property(self, letter: str, start: int) -> str:
        end = self._source.find("}", self._at)
        if not self._next("{") or end < 0 or self._ignore_case:
            raise self._refusal(start)
        name = self._source[self._at : end]
        if name.startswith("^") and self._onig:
            name, letter = name[1:], "P" if letter == "p" else "p"
        if name not in PROPERTIES:
            raise self._refusal(start)
        self._at = end + 1
        return rf"\{letter}{{{name}}}"

    def _code(self, digits: int, start: int) -> str:
        """A character by its number, \\x41, \\u0041 or \\x{1F600}."""
        if self._next("{"):
            end = self._source.find("}", self._at)
            text, after = self._source[self._at : max(end, self._at)], end + 1
        else:
            text, after = self._source[self._at : self._at + digits], self._at + digits
            if digits == 2 and self._onig and text[:1] > "7":  # there it is a byte of UTF-8
                raise self._refusal(start)
        if not text or len(text) > 6 or not set(text) <= set("0123456789abcdefABCDEF"):
            raise self._refusal(start)
        number = int(text, 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000 or after <= 0:
            raise self._refusal(start)
        self._at = after
        return chr(number)

    def _brackets(self, start: int) -> Node:
        negated = self._next("^")
        items: list[str] = []
        not_word = False
        while self._peek() != "]" or (not items and not not_word):
            at = self._at
            if self._source[at : at + 2] in ("&&", "--", "~~", "[:") or self._peek() in ("[", "]"):
                raise self._refusal(start)
            item = self._item()
            if item in (r"\w", r"\W"):
                items += self._word if item == r"\w" else ()
                not_word = not_word or item == r"\W"
                continue
            if self._peek() == "-" and self._source[self._at + 1 : self._at + 2] not in ("]", ""):
                self._take()
                last = self._item()
                if len(item) != 1 or len(last) != 1 or item > last or self._ignore_case:
                    raise self._refusal(start)
                items.append(f"{inside(item)}-{inside(last)}")
            elif len(item) == 1:
                items += self._literal(item, at).items
            else:
                items.append(item)
        self._take()
        if not not_word:
            return Characters(tuple(items), negated)
        # A union with \W, without a class within a class.
        if not items:
            return Characters(self._word, not negated)
        if negated:
            others = Look(Characters(tuple(items)), behind=False, negated=True)
            return Sequence((others, Characters(self._word)))
        return Choice((Characters(tuple(items)), Characters(self._word, negated=True)))

    def _item(self) -> str:
        """A character of a class, or a class such as \\s."""
        start = self._at
        character = self._take()
        if character != "\\":
            return character
        letter = self._take()
        return f"\\{letter}" if letter in "wW" else self._escaped(letter, start)


_OPENINGS: dict[str, Callable[[Node], Node]] = {
    ":": lambda node: node,
    ">": Atomic,
    "=": lambda node: Look(node, behind=False, negated=False),
    "!": lambda node: Look(node, behind=False, negated=True),
    "<=": lambda node: Look(node, behind=True, negated=False),
    "<!": lambda node: Look(node, behind=True, negated=True),
}


def _joins(first: Node, second: Node) -> bool:
    """Whether two characters may be a ligature if the case is ignored."""
    match first, second:
        case Characters(left, False), Characters(right, False):
            return any(a + b in _JOINED for a in left for b in right)
    return not isinstance(first, Characters) or not isinstance(second, Characters)


def _nested(node: Node) -> bool:
    alternatives = node.parts if isinstance(node, Choice) else (node,)
    return not all(
        isinstance(part, Characters)
        or (isinstance(part, Sequence) and all(isinstance(p, Characters) for p in part.parts))
        for part in alternatives
    )


_NEWLINE = Characters((r"\n",))
_AT_START, _AT_END = Edge("start"), Edge("end")
# Oniguruma's `^` does not match after a line break that ends the text; its `$` does.
_LINE_START = Choice(
    (
        _AT_START,
        Sequence(
            (
                Look(_NEWLINE, behind=True, negated=False),
                Look(_AT_END, behind=False, negated=True),
            )
        ),
    )
)
_LINE_END = Choice((_AT_END, Look(_NEWLINE, behind=False, negated=False)))

_ALPHANUMERIC = (r"\p{Alphabetic}", r"\p{M}", r"\p{Nd}", r"\p{Pc}")
# What \w is: in tiktoken and `regex` (UTS 18, annex C), and in Oniguruma, there with six more
# characters outside of brackets.
_WORD = {"tiktoken": (*_ALPHANUMERIC, "\u200c", "\u200d"), "oniguruma": _ALPHANUMERIC}
_BARE_WORD = {"tiktoken": _WORD["tiktoken"], "oniguruma": (*_ALPHANUMERIC, *"¹²³¼½¾")}
_CATEGORIES = {
    "L": "ultmo",
    "M": "nce",
    "N": "dlo",
    "P": "cdseifo",
    "S": "mcko",
    "Z": "slp",
    "C": "cf",
}
_SCRIPTS = """Arabic Armenian Bengali Bopomofo Cyrillic Devanagari Georgian Greek Hangul Han Hebrew
Hiragana Katakana Latin Tamil Telugu Thai"""
PROPERTIES = frozenset(
    [*_CATEGORIES, *_SCRIPTS.split(), "Alphabetic"]
    + [first + second for first, seconds in _CATEGORIES.items() for second in seconds]
)
"""The names in \\p{…} that mean the same in all engines."""

_CODES = {"x": 2, "u": 4}  # digits after \x and \u
_FOLDED = {"k": "\u212a", "s": "\u017f"}  # also equal to k and s when the case is ignored
_JOINED = {"ss", "ff", "fi", "fl", "st"}  # Oniguruma takes these for ß and ligatures, too
