"""JSON schemas as llguidance takes them without changing a number.

llguidance computes with numbers as float64 and int64: it would write 1234567890123456789 as
1234567890123456768. `prepare` refuses a number that it would change. Bounds are an exception,
since 2^63 - 1 is in many schemas: a bound beyond 2^53 of a range that is wider than that is moved
inwards, to a number that is exact.
"""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import gptk

DEEPEST = 120
"""Levels of nesting; llguidance's reader of JSON takes 127."""

_LOW = ("minimum", "exclusiveMinimum")
_HIGH = ("maximum", "exclusiveMaximum")
_MOST = ("maxLength", "maxItems", "maxProperties")
_LEAST = ("minLength", "minItems", "minProperties")
_LITERALS = ("const", "enum")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$defs", "definitions", "$schema", "$id", "$comment", "$anchor", "x-guidance"),
}

_EXACT = 2**53
_STEP = 10**11
"""float64 holds its multiples up to 2^63 exactly, and prints all their digits."""
_LARGEST = 2**63 // _STEP * _STEP
_MOST_COUNT = 2**32 - 1


def prepare(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a schema that means the same to llguidance.

    Raises ValueError for a number that llguidance would change, and for what is not JSON.
    """
    prepared = _schema(schema, 0)
    _check_multiples(prepared)
    return dict(prepared)


def is_plain(schema: Mapping[str, Any]) -> bool:
    """Whether llguidance is certain to compile a schema in little time, memory and stack."""
    values = patterns = 0
    for value in _values(schema):
        values += 1
        if isinstance(value, Mapping):
            by_pattern = value.get("patternProperties")
            patterns += len(by_pattern) if isinstance(by_pattern, Mapping) else 0
            if _combines(value) or _coefficient(value.get("multipleOf", 1)) > 100_000:
                return False
    return values <= 600 and patterns <= 5 and len(json.dumps(schema)) <= 20_000


def replace_json(grammar: str, schemas: "Iterator[tuple[int, int]]") -> str:
    """A Lark grammar with its JSON schemas prepared. schemas: where each begins and ends."""
    parts, position = [], 0
    for start, end in schemas:
        text = grammar[start:end]
        schema = gptk.plugins.from_json(text)
        if isinstance(schema, dict):
            before = json.dumps(schema, default=float)
            after = json.dumps(prepare(schema), ensure_ascii=False)
            if before != json.dumps(json.loads(after)):
                text = after
        parts += [grammar[position:start], text]
        position = end
    return "".join([*parts, grammar[position:]])


def _schema(value: Any, depth: int, *, in_map: bool = False) -> Any:
    """A copy of a value in a schema. in_map: it maps names to schemas."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if isinstance(value, list | tuple):
        return [_schema(item, depth + 1) for item in value]
    if not isinstance(value, Mapping):
        return _number(value) if _is_number(value) else _scalar(value)
    copy = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{_shown(key)} is a key, and keys in JSON are texts")
        if in_map and not isinstance(item, Mapping | bool):
            raise ValueError(f"{key} is {_shown(item)}, which is not a schema")
        if key in _LITERALS and not in_map:
            copy[key] = _literal(item, depth + 1)
        else:
            copy[key] = _schema(item, depth + 1, in_map=key in _MAPS and not in_map)
    if not in_map:
        copy |= _bounds(value)
    return copy


def _literal(value: Any, depth: int) -> Any:
    """A copy of a value that the text may have. Raises ValueError for a number that is changed."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {_scalar(key): _literal(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item, depth + 1) for item in value]
    if not _is_number(value):
        return _scalar(value)
    number = _number(value)
    whole = isinstance(value, int) and float(number) == value
    if not (abs(number) < 2**63 and (whole or _prints_exactly(value))):
        raise ValueError(
            f"llguidance would change the number {_shown(value)}; it holds whole "
            "numbers to 2^53, and others of up to 15 digits"
        )
    return number


def _bounds(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds and counts of a schema that has any, as numbers that llguidance takes exactly."""
    numbers = {
        key: Fraction(str(value) if isinstance(value, float) else value)
        for key, value in schema.items()
        if key in (*_LOW, *_HIGH) and _is_number(value) and _number(value) is not None
    }
    low = max((numbers[key] for key in _LOW if key in numbers), default=None)
    high = min((numbers[key] for key in _HIGH if key in numbers), default=None)
    bounds: dict[str, Any] = {}
    for key, number in numbers.items():
        exclusive = key.startswith("exclusive") or schema.get(f"exclusive{key.title()}") is True
        sign = 1 if key in _HIGH else -1  # a lower bound is the upper bound of the negated numbers
        other = low if key in _HIGH else high
        room = None if other is None else sign * (number - other)
        bounds[key] = sign * _upper_bound(key, schema[key], sign * number, room, exclusive)
    for key in _MOST:
        if _is_number(schema.get(key)) and schema[key] > _MOST_COUNT:
            bounds[key] = _MOST_COUNT
    for key in _LEAST:
        if _is_number(schema.get(key)) and schema[key] > _MOST_COUNT:
            raise ValueError(f"{key} {_shown(schema[key])} is more than a text can have")
    if _is_number(schema.get("multipleOf")):
        _coefficient(schema["multipleOf"], refuse=True)
    return bounds


def _upper_bound(
    key: str, given: Any, bound: Fraction, room: Fraction | None, exclusive: bool
) -> int | float:
    """The upper bound, or one below it that is exact. room: from the lower bound to it, if any."""
    shown = _shown(given)
    if abs(bound) < _EXACT:
        number = int(bound) if bound.denominator == 1 else float(bound)
        if Fraction(repr(number)) != bound or (bound * 10**100).denominator > 1:
            raise ValueError(f"{key} {shown} has more digits than llguidance holds; shorten it")
        return number
    moved = min((math.floor(bound) - exclusive) // _STEP * _STEP, _LARGEST)
    # With one bound llguidance computes with the next power of ten, too, which must fit.
    exact = moved > -(10**18) if room is None else room > _EXACT
    if not exact or moved < -_LARGEST:
        raise ValueError(
            f"{key} {shown} is beyond what llguidance holds exactly, -2^53 to 2^53; it may be "
            "beyond only if the range is wider than that"
        )
    return moved


def _coefficient(multiple: Any, *, refuse: bool = False) -> int:
    """The digits of `multipleOf` as a whole number, found as llguidance finds them.

    refuse: raise ValueError if they are not those of the number. It is 0 for what is no number.
    """
    if not _is_number(multiple):
        return 0
    value = abs(float(multiple))
    exact = Fraction(repr(value)) if isinstance(multiple, float) else abs(Fraction(multiple))
    power = 0
    while not value.is_integer() and power < 20:
        value *= 10
        power += 1
    if refuse and not (value < 2**32 and value == exact * 10**power):
        raise ValueError(f"multipleOf {_shown(multiple)} has digits that llguidance does not hold")
    while power and value % 10 == 0:
        value, power = value / 10, power - 1
    return int(value)


def _check_multiples(schema: Mapping[str, Any]) -> None:
    """Raises ValueError if multiples might be combined to one beyond llguidance's 32 bits."""
    nodes = [value for value in _values(schema) if isinstance(value, Mapping)]
    multiples = [
        abs(Fraction(str(node["multipleOf"])))
        for node in nodes
        if _is_number(node.get("multipleOf")) and node["multipleOf"]
    ]
    if not (any(map(_combines, nodes)) and multiples):
        return
    if len(multiples) == 1 and not any("$ref" in node for node in nodes):
        return
    scale = 1
    while any((multiple * scale).denominator > 1 for multiple in multiples):
        scale *= 10
    scaled = [int(multiple * scale) for multiple in multiples]
    if math.lcm(*scaled) * max(scaled) >= 2**32:
        given = " and ".join(sorted({str(float(multiple)) for multiple in multiples}))
        raise ValueError(f"llguidance cannot combine multipleOf {given}")


def _combines(schema: Mapping[str, Any]) -> bool:
    """Whether llguidance intersects subschemas of a schema, which can multiply its size."""
    if "allOf" in schema or {"patternProperties", "properties"} <= schema.keys():
        return True
    kinds = [key for key in schema if key in _COMBINING or key not in _ANNOTATIONS]
    return len(kinds) > 1 and any(key in _COMBINING for key in kinds)


def _values(value: Any) -> Iterator[Any]:
    """A value and all values in it."""
    pending = [value]
    while pending:
        value = pending.pop()
        yield value
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """A number as int or float. Raises ValueError for one that float64 does not reach."""
    if isinstance(value, int):
        if abs(value) < 10**300:
            return int(value)
    elif math.isfinite(float(value)):
        digits = value.as_tuple() if isinstance(value, Decimal) else None
        if not digits or (len(digits.digits) < 400 and abs(value.adjusted()) < 400):
            return float(value)
    raise ValueError(f"the number {_shown(value)} is beyond what float64 holds")


def _prints_exactly(value: Any) -> bool:
    """Whether llguidance prints a number as a float64, and as an int64, with its own digits."""
    number, exact = float(value), Fraction(str(value))
    whole = not number.is_integer() or Fraction(number) == exact
    return whole and Fraction(repr(number)) == exact


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    raise ValueError(f"{_shown(value)} is no value that JSON has")


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else gptk.plugins.shown(value)
