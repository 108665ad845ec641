"""The parts of a split pattern, and how they are written for each engine."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gptk.errors import TokenizerError

Dialect = Literal["tiktoken", "oniguruma", "regex"]


@dataclass(frozen=True)
class Characters:
    """One character of a class; its items are spelled as within brackets."""

    items: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True)
class Sequence:
    """One part after another."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Choice:
    """The first of the alternatives with which the whole matches."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """A part at least `least` and at most `most` times (None: any number)."""

    part: "Node"
    least: int
    most: int | None
    mode: Literal["", "?", "+"]
    """As many as possible, as few as possible, or as many as possible without giving any back."""


@dataclass(frozen=True)
class Look:
    """A condition on the text ahead or behind."""

    part: "Node"
    behind: bool
    negated: bool


@dataclass(frozen=True)
class Atomic:
    """A part whose first match is kept."""

    part: "Node"


@dataclass(frozen=True)
class Edge:
    """The start or the end of the text, or a word boundary."""

    kind: Literal["start", "end", "b", "B"]


Node = Characters | Sequence | Choice | Repeat | Look | Atomic | Edge

ANY = Characters((r"\s", r"\S"))
CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_SPELLED = {value: rf"\{letter}" for letter, value in CONTROLS.items()}


def shortest(node: Node) -> int:
    """The fewest characters that a part matches."""
    match node:
        case Characters():
            return 1
        case Sequence(parts):
            return sum(map(shortest, parts))
        case Choice(parts):
            return min(map(shortest, parts))
        case Repeat(part, least):
            return least * shortest(part)
        case Atomic(part):
            return shortest(part)
    return 0


def written(node: Node, dialect: Dialect) -> Iterator[str]:
    match node:
        case Characters((r"\s", r"\S")):
            yield r"[\s\S]"
        case Characters((item,), False) if len(item) == 1 or _ESCAPED.fullmatch(item):
            yield _outside(item)
        case Characters(items, negated):
            yield f"[{'^' * negated}{''.join(items)}]"
        case Sequence(parts):
            for part in parts:
                yield from _group(part, dialect, isinstance(part, Choice))
        case Choice(parts):
            for index, part in enumerate(parts):
                yield "|" * bool(index)
                yield from written(part, dialect)
        case Repeat(part, least, most, mode):
            if mode == "+" and (least, most) not in SHORT and dialect == "oniguruma":
                yield from written(Atomic(Repeat(part, least, most, "")), dialect)
                return
            yield from _group(part, dialect, not isinstance(part, Characters))
            yield SHORT.get((least, most)) or (
                f"{{{least}}}" if least == most else f"{{{least},{'' if most is None else most}}}"
            )
            yield mode
        case Look(part, behind, negated):
            if behind and dialect == "oniguruma" and _looks(part):
                raise TokenizerError("its split pattern has a lookaround within a lookbehind")
            yield f"(?{'<' * behind}{'!' if negated else '='}"
            yield from written(part, dialect)
            yield ")"
        case Atomic(part):
            yield "(?>"
            yield from written(part, dialect)
            yield ")"
        case Edge(kind):
            if kind not in _EDGES[dialect]:
                raise TokenizerError(f"its split pattern has '\\{kind}', unlike that of {dialect}")
            yield _EDGES[dialect][kind]


def _looks(node: Node) -> bool:
    match node:
        case Look():
            return True
        case Sequence(parts) | Choice(parts):
            return any(map(_looks, parts))
        case Repeat(part) | Atomic(part):
            return _looks(part)
    return False


def _group(part: Node, dialect: Dialect, needed: bool) -> Iterator[str]:
    yield "(?:" * needed
    yield from written(part, dialect)
    yield ")" * needed


_ESCAPED = re.compile(r"\\(?:[^pP]|[pP]\{\w+\})")
SHORT = {(0, 1): "?", (0, None): "*", (1, None): "+"}
_EDGES = {
    "tiktoken": {"start": "^", "end": "$", "b": r"\b", "B": r"\B"},
    "regex": {"start": r"\A", "end": r"\Z", "b": r"\b", "B": r"\B"},
    "oniguruma": {"start": r"\A", "end": r"\z"},  # its \b is by its own \w
}


def _outside(item: str) -> str:
    """A single item of a class, spelled as it is outside of brackets."""
    if len(item) == 1:
        return f"\\{item}" if item in r".+*?(){}$|" else item
    return item[1:] if item[1] in "-&~" else item


def inside(character: str) -> str:
    """A character, spelled as it is within brackets."""
    if character in r"\[]^-&~":
        return f"\\{character}"
    return _SPELLED.get(character, character)
