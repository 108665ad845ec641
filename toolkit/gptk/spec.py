"""Spec strings, which name a plug-in with its options.

`name` or `name:key=value,key=value`. The first value may come without a key, `beam:4`, if the
plug-in has an option for that; a text that begins with `key=` is never such a value, unless it is
quoted.

A value with a comma, a space or a quote at its start is quoted, `"…"` or `'…'`. In quotes `\\n`,
`\\t`, `\\r` and `\\0` are control characters; `\\\\`, `\\"` and `\\'` are the second character; a
backslash before any other character is a backslash, as in `"\\d+, \\w"`. Lists and the like are
written as JSON, which needs no quotes of its own: `tokens=[1, 2]`.

>>> parse_spec("beam:width=4,early_stopping=never")
('beam', {'width': '4', 'early_stopping': 'never'})
>>> parse_spec("beam:4,early_stopping=never")
('beam', {'': '4', 'early_stopping': 'never'})
>>> parse_spec(r'stop:text="a, b\\n"')
('stop', {'text': 'a, b\\n'})
>>> parse_spec('bad-words:words=["a b", "c"]')
('bad-words', {'words': '["a b", "c"]'})
>>> format_spec("stop", {"text": "a, b"})
'stop:text="a, b"'
"""

import json
import re
from collections.abc import Mapping

from gptk.errors import SpecError, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
UNNAMED = ""
"""The key, in what `parse_spec` returns, of a value that comes without one."""

_KEY = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_-]*)=")
_SPACE = re.compile(r"\s*")
_PLUS = re.compile(r"\s+\+\s+")
_QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""", re.DOTALL)
_PLAIN = re.compile(r"""(?!["'])[^,\s]+""")
_JSON = json.JSONDecoder(strict=False)  # strict=False: strings may hold raw line breaks
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}
_FORM = (
    "expected name, name:value or name:key=value,key=value, with quotes round a value such as "
    '"a, b"'
)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split a spec string into its name and its options, whose values stay text.

    A value without a key has the key "". Raises SpecError, which quotes the part that cannot be
    read.
    """
    name, options, end = _read(spec, 0)
    if end < len(spec):
        raise _unreadable(spec, end)
    return name, options


def split_specs(specs: str) -> list[str]:
    """The spec strings in a text that are joined by ` + `, a plus sign between spaces.

    >>> split_specs('top-p:0.9 + repetition-penalty:1.1 + stop:text="a + b"')
    ['top-p:0.9', 'repetition-penalty:1.1', 'stop:text="a + b"']

    Raises SpecError.
    """
    found, start = [], 0
    while True:
        end = _read(specs, start)[2]
        found.append(specs[start:end])
        if end == len(specs):
            return found
        plus = _PLUS.match(specs, end)
        if plus is None:
            raise _unreadable(specs, end)
        start = plus.end()


def _read(spec: str, start: int) -> tuple[str, dict[str, str], int]:
    """The name and the options of the spec that begins at `start`, and where it ends.

    That is before the first character that cannot belong to it.
    """
    name = NAME.match(spec, start)
    if not name:
        raise SpecError(f"not a spec: {shown(spec[start:], 200)}; {_FORM}")
    position = name.end()
    options: dict[str, str] = {}
    while spec[position : position + 1] == (":" if not options else ","):
        key, value_start = _key(spec, position + 1)
        value = _value(spec, value_start)
        if key == UNNAMED and value and options:
            raise SpecError(
                f"{shown(spec, 200)} has {shown(value[0])} without the name of its option; only "
                "the first value may come without, and a value with a comma is quoted"
            )
        if not value:
            place = f"for {key}" if key else f"after {shown(spec[: position + 1])}"
            raise SpecError(f"{shown(spec, 200)} has no value {place}; {_FORM}")
        option = key.replace("-", "_")  # plug-in names have hyphens, so people write them here
        if option in options:
            raise SpecError(f"{shown(spec, 200)} gives {key} twice")
        options[option], position = value
    return name[0], options, position


def _unreadable(spec: str, position: int) -> SpecError:
    rest = shown(spec[position:])
    return SpecError(f"cannot read {shown(spec, 200)} from {rest} on; {_FORM}")


def _key(spec: str, start: int) -> tuple[str, int]:
    """The key before the value at `start`, "" if there is none, and where the value begins."""
    if key := _KEY.match(spec, start):
        return key[1], key.end()
    space = _SPACE.match(spec, start)
    assert space
    return UNNAMED, space.end()


def _value(spec: str, start: int) -> tuple[str, int] | None:
    """The value that begins at `start`, and where it ends."""
    if quoted := _QUOTED.match(spec, start):
        return unescape(quoted[0][1:-1]), quoted.end()
    end = _json_end(spec, start)
    if end is not None and spec[end : end + 1].strip() in ("", ","):
        return spec[start:end], end
    if plain := _PLAIN.match(spec, start):
        return plain[0], plain.end()
    return None


def _json_end(text: str, start: int) -> int | None:
    """Where a list or an object that begins at `start` ends, if it is JSON."""
    if text[start : start + 1] not in ("[", "{"):
        return None
    try:
        return _JSON.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def format_spec(name: str, options: Mapping[str, object]) -> str:
    """The spec string that `parse_spec` reads back to the same name and options."""
    if not options:
        return name
    return f"{name}:" + ",".join(f"{key}={format_value(v)}" for key, v in options.items())


def unescape(text: str) -> str:
    """Replace `\\n`, `\\t`, `\\r`, `\\0`, `\\\\`, `\\"` and `\\'`; other backslashes stay.

    >>> unescape(r"a\\tb"), unescape(r"\\d"), unescape(r"\\\\d")
    ('a\\tb', '\\\\d', '\\\\d')
    """
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), text, flags=re.DOTALL)


def format_value(value: object) -> str:
    """A value as `parse_spec` reads it: JSON unless it is text, and quoted where it must be."""
    text = value if isinstance(value, str) else json.dumps(value)
    if _PLAIN.fullmatch(text) or _json_end(text, 0) == len(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    for letter, character in _ESCAPES.items():
        if letter in "ntr0":
            text = text.replace(character, f"\\{letter}")
    return f'"{text}"'
