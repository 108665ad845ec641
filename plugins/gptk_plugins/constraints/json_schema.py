r"""JSON schema (draft 2020-12): the new text is a JSON value that the schema allows.

$$\text{valid}(\text{text}) \iff \text{the schema allows } \text{json}(\text{text})$$

and the text is written as `json.dumps` writes it: a space after each comma and colon, no other
whitespace, and properties in the order of the schema. With free whitespace small models write only
whitespace up to the last token; the schema's key `x-guidance`,
`{"whitespace_flexible": true, "item_separator": ",", "key_separator": ":"}`, allows it. A text is
certain to end only if `maxLength`, `maxItems`, `minimum`, `maximum` and `additionalProperties`
bound it. Keywords that llguidance does not support are an error, unless `x-guidance` has
`"lenient": true`.

In Python the schema may be a class: a pydantic model, a dataclass or a TypedDict, whose objects
have no properties but those declared. `parse` then makes an instance of it.

```py
from gptk_plugins.constraints import JsonSchema


class Person(pydantic.BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


out = lm.generate(prompt, processors=[JsonSchema(schema=Person)])
```

A number that llguidance would change, such as a constant beyond 2^53, is an error. A bound beyond
2^53 of a range wider than that is moved inwards to a multiple of 10^11, and one beyond 2^63 to
9223372000000000000.
"""

import json
import warnings
from typing import Any

import pydantic
from pydantic import Field, field_serializer
from pydantic.json_schema import SkipJsonSchema

import gptk
from gptk_plugins.constraints import _schema
from gptk_plugins.constraints._matcher import Constraint

STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# The option shadows BaseModel.schema of pydantic 1, deprecated since 2.0.
warnings.filterwarnings("ignore", 'Field name "schema" in "JsonSchema" shadows', UserWarning)


class JsonSchema(Constraint):
    """The new text is JSON that a schema allows."""

    name = "json-schema"
    example = (
        'schema={"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'
    )
    positional = "schema"
    other_names = {"guided_json": "schema"}

    schema: str | dict[str, Any] | SkipJsonSchema[type] = Field(  # type: ignore[assignment]
        description="a JSON schema: a file, or the JSON object itself; in Python also a class"
    )

    def grammar_text(self) -> str:
        schema = _schema.prepare(self._as_json())
        guidance = schema.get("x-guidance", {})
        style = {**STYLE, **guidance} if isinstance(guidance, dict) else guidance
        return "start: %json " + json.dumps({**schema, "x-guidance": style}, ensure_ascii=False)

    def is_plain(self, grammar: str) -> bool:
        return _schema.is_plain(json.loads(grammar.removeprefix("start: %json ")))

    def subject(self) -> str:
        if isinstance(self.schema, type):
            return f"schema of {self.schema.__name__}"
        is_file = isinstance(self.schema, str) and not _is_literal(self.schema)
        return gptk.plugins.shown(self.schema, 500) if is_file else "schema"

    def parse(self, text: str) -> object:
        """The value of a JSON text, or an instance of the class that is the schema.

        None if the text is not complete. Raises DecodingError if the class refuses it, which its
        validators may.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(self.schema, type):
            return value
        try:
            return pydantic.TypeAdapter(self.schema).validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise gptk.DecodingError(
                f"{self.schema.__name__} refuses the text {gptk.plugins.shown(text, 80)}: "
                + f"{place}: {first['msg']}".removeprefix(": ")
            ) from None

    @field_serializer("schema")
    def _as_text(self, schema: Any) -> Any:
        return _schema_of(schema) if isinstance(schema, type) else schema

    def _as_json(self) -> dict[str, Any]:
        if isinstance(self.schema, type):
            return _schema_of(self.schema)
        if isinstance(self.schema, dict):
            return self.schema
        text = self._read(self.schema, literal=_is_literal(self.schema), form="a JSON object")
        try:
            schema = gptk.plugins.from_json(text)
        except RecursionError:
            raise ValueError("is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise ValueError("is not a JSON object")
        return schema


def _schema_of(cls: type) -> dict[str, Any]:
    """The JSON schema of a class. Raises ValueError for a class that has none."""
    try:
        schema = pydantic.TypeAdapter(cls).json_schema()
    except (pydantic.errors.PydanticUserError, NameError) as error:  # or an undefined annotation
        raise ValueError(str(error).splitlines()[0]) from None
    for part in (schema, *schema.get("$defs", {}).values()):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


def _is_literal(option: str) -> bool:
    return option.lstrip().startswith("{")
