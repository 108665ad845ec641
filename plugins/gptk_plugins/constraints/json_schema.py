r"""JSON schema (draft 2020-12): the new text is a JSON value that the schema allows.

$$\text{valid}(\text{text}) \iff \text{the schema allows } \text{json}(\text{text})
\text{, and text is written as json.dumps writes it}$$

That is: a space after each comma and colon, no other whitespace, and properties in the order of
the schema. With free whitespace small models write only whitespace up to the last token; the
schema's key `x-guidance`,
`{"whitespace_flexible": true, "item_separator": ",", "key_separator": ":"}`, allows it.
A text is certain to end only if `maxLength`, `maxItems`, `minimum`, `maximum` and
`additionalProperties` bound it. Keywords that llguidance does not support are an error, unless
`x-guidance` has `"lenient": true`.
"""

import json
import warnings
from typing import Any

from pydantic import Field

from gptk_plugins.constraints._matcher import Constraint, read_option

STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# The option shadows BaseModel.schema of pydantic 1, deprecated since 2.0.
warnings.filterwarnings("ignore", 'Field name "schema" in "JsonSchema" shadows', UserWarning)


class JsonSchema(Constraint):
    """The new text is JSON that a schema allows."""

    name = "json-schema"
    example = (
        'schema={"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'
    )

    schema: str | dict[str, Any] = Field(  # type: ignore[assignment]
        description="a JSON schema: a file, or the JSON object itself"
    )

    def grammar_text(self) -> str:
        schema = self.schema if isinstance(self.schema, dict) else self._read(self.schema)
        guidance = schema.get("x-guidance", {})
        style = {**STYLE, **guidance} if isinstance(guidance, dict) else guidance
        return "start: %json " + json.dumps({**schema, "x-guidance": style}, ensure_ascii=False)

    def subject(self) -> str:
        is_file = isinstance(self.schema, str) and not _is_literal(self.schema)
        return repr(self.schema) if is_file else "schema"

    @staticmethod
    def _read(option: str) -> dict[str, Any]:
        text = read_option(option, literal=_is_literal(option), form="a JSON object")
        try:
            schema = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise ValueError("is not a JSON object")
        return schema


def _is_literal(option: str) -> bool:
    return option.lstrip().startswith("{")
