"""Typed options: validation, parsing and help follow from one declaration of a class's fields."""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args

import pydantic

from gptk.errors import (
    OptionError,
    PluginError,
    shown,
    suggest,
)
from gptk.spec import UNNAMED

AnyOptions = TypeVar("AnyOptions", bound="Options")


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(pydantic.BaseModel)


class _Declaring(ModelMetaclass):
    """Tells an option that is declared without a type in gptk's words."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **settings: Any
    ) -> type:
        try:
            made: type = super().__new__(cls, name, bases, namespace, **settings)
        except pydantic.errors.PydanticUserError as error:
            quoted = re.search(r"[`'](\w+)", str(error))
            if error.code != "model-field-missing-annotation" or quoted is None:
                raise
            raise PluginError(
                f"{quoted[1]} of {name} has no type; declare an option with one, as in "
                f"`{quoted[1]}: float = 1.0`, and what is none as `ClassVar`"
            ) from None
        return made


class Options(pydantic.BaseModel, metaclass=_Declaring):
    """Typed, bounded options: pydantic fields with default, bounds and a `description`.

    Validation, parsing and help follow from that declaration. Instances are frozen, compare by
    value and can be shared. Wrong options raise OptionError; so does a whole number that 64 bits
    do not hold, anywhere in an option.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    positional: ClassVar[str] = ""
    """The option that a spec string may give without its name, as in `beam:4`; "" for none."""

    def __init__(self, **options: Any) -> None:
        for name, value in options.items():
            if isinstance(value, bool) and not _takes_bool(type(self), name):
                raise OptionError(_refused(type(self), name, value))  # pydantic takes True as 1
        try:
            super().__init__(**options)
        except pydantic.ValidationError as error:
            raise OptionError(_explain(type(self), error)) from None
        except RecursionError:
            raise OptionError(f"{self.title()}: an option is nested too deeply") from None

    @pydantic.model_validator(mode="after")
    def _whole_numbers_fit(self) -> Self:
        for name in self.model_fields_set:
            if (number := _too_large(getattr(self, name))) is not None:
                raise ValueError(
                    f"{name}: {shown(number)} is not allowed; whole numbers go from -2^63 to "
                    "2^63 - 1"
                )
        return self

    @classmethod
    def title(cls) -> str:
        """What has these options, for messages: `sampler beam`."""
        raise NotImplementedError


def from_options(options_class: type[AnyOptions], options: Mapping[str, str]) -> AnyOptions:
    """An instance of a class from options as text, as `parse_spec` returns them.

    Raises OptionError.
    """
    fields = options_class.model_fields
    typed = {
        key: from_text(text) if key in fields and fields[key].annotation not in _TEXTS else text
        for key, text in _named(options_class, options).items()
    }
    return options_class(**typed)


def _named(options_class: type[Options], options: Mapping[str, str]) -> dict[str, str]:
    """The options with the name of the one that was given without it."""
    title, positional = options_class.title(), options_class.positional
    known = options_class.model_fields
    first = next(iter(options), UNNAMED)
    if first != UNNAMED:
        if first not in known and positional and _takes_text(known[positional]):
            raise OptionError(
                f"{title} has no option {shown(first)}; {suggest(first, known, what='options')}"
                f"; a value with = in it is quoted, " + f'"{first}={options[first]:.60}"'
            )
        return dict(options)
    if not options:
        return {}
    value = shown(options[UNNAMED])
    if not positional:
        names = ", ".join(f"{name}=…" for name in known)
        raise OptionError(
            f"{title} takes no value without a name, such as {value}; "
            + (f"give the option's name: {names}" if names else "it has no options")
        )
    if positional in options:
        raise OptionError(f"{title}: {positional} is given twice, by its name and as {value}")
    return {(name or positional): value for name, value in options.items()}


def _takes_text(field: pydantic.fields.FieldInfo) -> bool:
    return not {str, Path}.isdisjoint((field.annotation, *get_args(field.annotation)))


_TEXTS = (str, Path)
"""Types whose values are the text itself."""


def from_text(text: str) -> object:
    """The value of an option written as text; lists, objects and null are JSON."""
    if text[:1] in "[{" or text == "null":
        try:
            return from_json(text)
        except (ValueError, RecursionError):
            pass
    return text  # pydantic converts it to a number, a bool, …


def from_json(text: str, *, exact: bool = True) -> Any:
    """The value of a text in JSON, read strictly.

    exact: a number that float64 does not hold becomes a Decimal, and strings may have raw line
    breaks, since unescaping a spec string may have made these of `\\n`. Raises ValueError, with
    what is wrong, for a text that is no JSON, for a key that an object has twice, for NaN, and,
    unless exact, for a number beyond float64; RecursionError for one nested too deeply.

    >>> from_json("[0.5, 0.10000000000000000001]")
    [0.5, Decimal('0.10000000000000000001')]
    """
    return json.loads(
        text,
        strict=not exact,
        parse_int=_whole,
        parse_float=_exact if exact else _finite,
        parse_constant=_no_constant,
        object_pairs_hook=_unique,
    )


def _exact(number: str) -> float | Decimal:
    try:
        value, exact = float(number), Decimal(number)
    except InvalidOperation:  # its exponent has more than 18 digits
        raise ValueError(f"the number {number:.40} is too large or too small") from None
    return value if Decimal(repr(value)) == exact else exact


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number:.20} is too large")
    return value


def _whole(number: str) -> int:
    if len(number) > 1000:
        raise ValueError(f"a number has {len(number):,} digits")
    return int(number)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} occurs twice")
            seen.add(key)
    return found


def _too_large(value: object) -> int | None:
    """The first whole number in a value, or in a list of values, that 64 bits do not hold."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_too_large, value)), None)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return value
    return None


def option_help(options_class: type[Options]) -> list[tuple[str, str, str, str]]:
    """The options of a class as (name, type and bounds, default, line of help)."""
    try:
        schema = options_class.model_json_schema(by_alias=False)
    except pydantic.errors.PydanticInvalidForJsonSchema:
        schema = {}
    rows = []
    for name, option in options_class.model_fields.items():
        allowed = _allowed(schema.get("properties", {}).get(name, {}), schema.get("$defs", {}))
        default = "required"
        if not option.is_required():
            default = _text(option.get_default(call_default_factory=True, validated_data={}))
        rows.append((name, allowed, default, option.description or ""))
    return rows


_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "pattern": "like {}",
    "minLength": "of {} characters or more",
    "maxLength": "of {} characters at most",
    "minItems": "of {} or more",
    "maxItems": "of {} at most",
}


def _allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema in a few words: `integer ≥ 1`, `true or false or never`."""
    if "$ref" in schema:
        return _allowed(definitions.get(schema["$ref"].rpartition("/")[2], {}), definitions)
    if "anyOf" in schema:
        return " or ".join(_allowed(part, definitions) for part in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = schema.get("type", "any")
    kind = {"boolean": "true or false", "null": "null"}.get(kind, kind)
    bounds = [form.format(_decimal(schema[key])) for key, form in _BOUNDS.items() if key in schema]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _text(value: object) -> str:
    """A default as it may be given: what is no number or text is JSON."""
    is_json = value in (None, "") or isinstance(value, bool | list | tuple | Mapping)
    if isinstance(value, float) and "e" in str(value):
        return str(_decimal(value))
    return json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)


def _decimal(value: object) -> object:
    """A number as people write it, without an exponent, unless that takes too many digits:
    `0.000001`, `1000000`."""
    is_written_out = isinstance(value, float) and (not value or 1e-9 <= abs(value) < 1e16)
    return f"{Decimal(str(value)).normalize():f}" if is_written_out else value


def _takes_bool(options_class: type[Options], name: str) -> bool:
    """Whether an option may be true or false; of one that there is not, pydantic says so."""
    field = options_class.model_fields.get(name)
    types: list[Any] = [field.annotation if field else Any]
    while types:
        annotation = types.pop()
        if any(annotation is accepting for accepting in (bool, Any, object, True, False)):
            return True
        types += get_args(annotation)
    return False


def _given(value: object) -> str:
    """A value in a message: as it was written, if that is a short line."""
    if isinstance(value, str) and value.isprintable() and len(value) <= 80:
        return value
    return str(value).lower() if isinstance(value, bool) else shown(value, 80)


def _explain(options_class: type[Options], error: pydantic.ValidationError) -> str:
    """A pydantic error as one line: what was given and what is allowed."""
    options = {name: (allowed, default) for name, allowed, default, _ in option_help(options_class)}
    who = options_class.title()
    errors = error.errors(include_url=False)
    # An unknown option first: it may be a misspelt name of one that is missing.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        known = suggest(key, options, what="options") if options else "it has no options"
        return f"{who} has no option {shown(key)}; {known}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{who} needs the option {key} ({options[key][0]})"
    if key not in options:
        return f"{who}: {' '.join(first['msg'].removeprefix('Value error, ').splitlines())}"
    return _refused(options_class, key, first["input"])


def _refused(options_class: type[Options], key: str, value: object) -> str:
    """The line for a value that an option does not allow."""
    allowed, default = next(row[1:3] for row in option_help(options_class) if row[0] == key)
    otherwise = "" if options_class.model_fields[key].is_required() else f" (default {default})"
    who = options_class.title()
    return f"{who}: {key}={_given(value)} is not allowed; {key} is {allowed}{otherwise}"
