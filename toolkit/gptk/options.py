"""Typed options: validation, parsing and help follow from one declaration of a class's fields."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from gptk.errors import (
    OptionError,
    suggest,
)

AnyOptions = TypeVar("AnyOptions", bound="Options")


class Options(pydantic.BaseModel):
    """Typed, bounded options: pydantic fields with default, bounds and a `description`.

    Validation, parsing and help follow from that declaration. Instances are frozen, compare by
    value and can be shared. Wrong options raise OptionError.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except pydantic.ValidationError as error:
            raise OptionError(_explain(type(self), error)) from None

    @classmethod
    def title(cls) -> str:
        """What has these options, for messages: `sampler beam`."""
        raise NotImplementedError


def from_options(options_class: type[AnyOptions], options: Mapping[str, str]) -> AnyOptions:
    """An instance of a class from options as text, as in a spec string. Raises OptionError."""
    fields = options_class.model_fields
    typed = {
        key: from_text(text) if key in fields and fields[key].annotation is not str else text
        for key, text in options.items()
    }
    return options_class(**typed)


def from_text(text: str) -> object:
    """The value of an option written as text; lists, objects and null are JSON."""
    if text[:1] in "[{" or text == "null":
        try:
            # Unescaping a spec string may have turned \n into a line break already.
            return json.loads(text, strict=False)
        except ValueError:
            pass
    return text  # pydantic converts it to a number, a bool, …


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
    bounds = [form.format(schema[key]) for key, form in _BOUNDS.items() if key in schema]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(options_class: type[Options], error: pydantic.ValidationError) -> str:
    """A pydantic error as one line: what was given and what is allowed."""
    options = {name: (allowed, default) for name, allowed, default, _ in option_help(options_class)}
    who = options_class.title()
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{who} has no option {key!r}; {suggest(key, options, what='options')}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{who} needs the option {key} ({options[key][0]})"
    if key not in options:
        return f"{who}: {first['msg'].removeprefix('Value error, ')}"
    allowed, default = options[key]
    value = _text(first["input"])
    otherwise = "" if options_class.model_fields[key].is_required() else f" (default {default})"
    return f"{who}: {key}={value} is not allowed; {key} is {allowed}{otherwise}"
