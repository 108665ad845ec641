"""Spec strings, which name a plug-in with its options.

`name` or `name:key=value,key=value`. A value with a comma, a space or a quote at its start is
quoted, `"…"` or `'…'`; inside quotes a backslash escapes (`\\n`, `\\t`, `\\"`, `\\\\`). Lists and
the like are written as JSON, which needs no quotes of its own: `tokens=[1, 2]`.

>>> parse_spec("beam:width=4,early_stopping=never")
('beam', {'width': '4', 'early_stopping': 'never'})
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

from gptk.errors import SpecError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_KEY = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_-]*)=")
_QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""", re.DOTALL)
_PLAIN = re.compile(r"""(?!["'])[^,\s]+""")
_JSON = json.JSONDecoder(strict=False)  # strict=False: strings may hold raw line breaks
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0"}
_FORM = 'expected name or name:key=value,key=value, with quotes round a value such as "a, b"'


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split a spec string into its name and its options, whose values stay text.

    Raises SpecError, which quotes the part that cannot be read.
    """
    name = NAME.match(spec)
    if not name:
        raise SpecError(f"not a spec: {spec!r}; {_FORM}")
    position = name.end()
    options: dict[str, str] = {}
    while position < len(spec):
        if spec[position] != (":" if not options else ","):
            raise SpecError(f"cannot read {spec!r} from {spec[position:]!r} on; {_FORM}")
        key = _KEY.match(spec, position + 1)
        if not key:
            raise SpecError(f"cannot read {spec!r} from {spec[position:]!r} on; {_FORM}")
        value = _value(spec, key.end())
        if not value:
            raise SpecError(f"{spec!r} gives no value for {key[1]}; {_FORM}")
        option = key[1].replace("-", "_")  # plug-in names have hyphens, so people write them here
        if option in options:
            raise SpecError(f"{spec!r} gives {key[1]} twice")
        options[option], position = value
    return name[0], options


def _value(spec: str, start: int) -> tuple[str, int] | None:
    """The value that begins at `start`, and where it ends."""
    if quoted := _QUOTED.match(spec, start):
        return unescape(quoted[0][1:-1]), quoted.end()
    if spec[start : start + 1] in ("[", "{"):
        try:
            end = _JSON.raw_decode(spec, start)[1]
        except (ValueError, RecursionError):
            end = start
        if end > start and spec[end : end + 1] in ("", ","):
            return spec[start:end], end
    if plain := _PLAIN.match(spec, start):
        return plain[0], plain.end()
    return None


def format_spec(name: str, options: Mapping[str, object]) -> str:
    """The spec string that `parse_spec` reads back to the same name and options."""
    if not options:
        return name
    return f"{name}:" + ",".join(f"{key}={_format_value(v)}" for key, v in options.items())


def unescape(text: str) -> str:
    """Replace the escapes `\\n`, `\\t`, `\\r`, `\\0`; any other escaped character is itself."""
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), text, flags=re.DOTALL)


def _format_value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if _PLAIN.fullmatch(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    for letter, character in _ESCAPES.items():
        text = text.replace(character, f"\\{letter}")
    return f'"{text}"'
