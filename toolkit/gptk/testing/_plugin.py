"""The promises that plug-ins of all kinds keep."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import assume
from hypothesis import strategies as st

import gptk
from gptk.testing._promises import check, instance, promise, separate_promise, worst_and_drawn


class PluginContract:
    """What plug-ins of every kind promise."""

    make: ClassVar[Any]
    """The plug-in's class, or a function without arguments that returns an instance."""
    _base: ClassVar[type] = gptk.Plugin
    """The class that the plug-in's class is derived from."""

    def plugin(self) -> Any:
        """The plug-in to test, which `make` makes once for all examples of a promise."""
        if "_made" not in vars(self):
            self._made = instance(self)
        return self._made

    @promise
    def test_it_can_be_made(self) -> None:
        """`make` makes a plug-in, and its class makes an equal one of the same options.

        Options are fields of the class, so that gptk can make it from a spec string.
        """
        plugin = self.plugin()
        wanted = f"gptk.{self._base.__name__}"
        check(isinstance(plugin, self._base), f"`make` makes {plugin!r:.60}, which is no {wanted}")
        problem = gptk.plugins.class_problem(plugin.kind, type(plugin))
        check(problem is None, str(problem))
        again = type(plugin)(**_options_of(plugin))
        check(again == plugin, f"made again of its options it is {again!r}, and was {plugin!r}")

    @separate_promise
    def test_it_says_what_it_does(self) -> None:
        """The class has a line of description, and so has every option.

        `gptk plugins` lists them, `gptk plugins show` and the reference explain them.
        """
        plugin = type(self.plugin())
        docstring = plugin.__dict__.get("__doc__") or ""
        check(docstring.strip(), f"{plugin.__name__} has no docstring")
        for name, _, _, help_ in gptk.plugins.option_help(plugin):
            check(help_, f"the option {name} has no description: Field(…, description=…)")

    @separate_promise
    @worst_and_drawn(12)
    def test_its_options_round_trip_through_the_spec_string(
        self, data: st.DataObject | None
    ) -> None:
        """`plugin.spec` makes an equal plug-in again, whatever its options.

        Configuration files, `--json` output and the trace name plug-ins by their spec strings.
        """
        first = self.plugin()
        try:
            gptk.plugins.parse_spec(first.spec)
        except gptk.OptionError:
            pytest.skip("an option is an object, which has no text")
        options = _options_of(first)
        if data is None:
            for other in ({}, *_worst_options(first)):
                self._round_trip(first, {**options, **other})
        else:
            drawn = data.draw(_drawn_options(first), label="options")
            assume(self._round_trip(first, {**options, **drawn}))

    @separate_promise
    def test_bad_options_are_refused(self) -> None:
        """An unknown option, one of another type and one out of bounds raise OptionError.

        The user gets a line that says what is allowed, instead of a wrong result.
        """
        plugin = self.plugin()
        for name, value in [("surely_not_an_option", 1), *_wrong_options(plugin)]:
            try:
                type(plugin)(**{**_options_of(plugin), name: value})
            except gptk.OptionError as error:
                check("\n" not in str(error), f"the error for {name}={value!r} has several lines")
            else:
                raise AssertionError(f"it accepts {name}={value!r}")

    @separate_promise
    def test_it_is_not_changed_by_use(self) -> None:
        """Nothing can be set on it, since one instance may serve several calls at once."""
        plugin = self.plugin()
        for name in (*type(plugin).model_fields, "surely_not_an_option"):
            try:
                setattr(plugin, name, getattr(plugin, name, None))
            except gptk.GptkError:
                continue
            raise AssertionError(f"its attribute {name} can be set")

    def _round_trip(self, first: gptk.Plugin, options: Mapping[str, Any]) -> bool:
        """Check the spec of the plug-in with other options; False if it does not allow these."""
        try:
            plugin = type(first)(**options)
        except gptk.GptkError:
            return False
        name, texts = gptk.plugins.parse_spec(plugin.spec)
        again = gptk.plugins.from_options(type(first), texts)
        check(name == first.name, f"the spec {plugin.spec!r} has another name than {first.name!r}")
        check(again == plugin, f"the spec {plugin.spec!r} of {plugin!r} makes {again!r}")
        return True


def options_schema(plugin_class: type[gptk.Plugin]) -> dict[str, dict[str, Any]]:
    """The JSON schema of each option; empty where an option's type has none."""
    if plugin_class not in _schemas:
        try:
            schema = plugin_class.model_json_schema(by_alias=False)
        except Exception:
            schema = {}
        _schemas[plugin_class] = schema.get("properties", {})
    return _schemas[plugin_class]


_schemas: dict[type, dict[str, dict[str, Any]]] = {}
"""Those made before: each takes some milliseconds."""


def _options_of(plugin: gptk.Plugin) -> dict[str, Any]:
    """The options that a plug-in was made with."""
    return {name: getattr(plugin, name) for name in plugin.model_fields_set}


def _types(field: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of an option's schema: that of `int | None` has two."""
    yield from field.get("anyOf", [field])


_TEXTS = ["", " ", "a, b", "a=b", ":", "'", '"', "\\", r"\n", "\n\t\r\0", "1", "true", "é€😀"]
_NUMBERS = [0.0, 1.0, -1.0, 0.1, 1 / 3, 1e-30, 1e30, -1e30]
_INTEGERS = [0, 1, -1, 2, 10**6, 2**53 + 1]
_ITEMS: dict[Any, list[Any]] = {
    "string": _TEXTS,
    "number": _NUMBERS,
    "integer": _INTEGERS,
}


def _worst_options(plugin: gptk.Plugin) -> Iterator[dict[str, Any]]:
    """For each option values that are hard to write as text, and its bounds."""
    for name, field in options_schema(type(plugin)).items():
        for schema in _types(field):
            for value in _worst_values(schema, alone="anyOf" not in field):
                yield {name: value}


def _worst_values(schema: Mapping[str, Any], *, alone: bool) -> list[Any]:
    """alone: there are no other types, as in `str | None`, where the text null means None."""
    if "enum" in schema or "const" in schema:
        return [*schema.get("enum", [schema.get("const")])]
    kind = schema.get("type")
    if kind == "boolean":
        return [False, True]
    if kind == "null":
        return [None]
    if kind in ("integer", "number"):
        bounds = [schema[key] for key in ("minimum", "maximum") if key in schema]
        return [*bounds, *_ITEMS[kind]]
    if kind == "string":
        return [*_TEXTS, "null", "[1]", "{}"] if alone else _TEXTS
    if kind == "array":
        values = _values_of(schema.get("items"))
        return [[], values, *([value] for value in values)]
    if kind == "object":
        values = _values_of(schema.get("additionalProperties"))
        return [{}, *({text: value} for text in ("1", *_TEXTS) for value in values[:3])]
    return []


def _values_of(items: object) -> list[Any]:
    """Values for the items of a list or an object, by their schema."""
    return _ITEMS.get(items.get("type"), []) if isinstance(items, Mapping) else []


def _wrong_options(plugin: gptk.Plugin) -> list[tuple[str, Any]]:
    """Options with values of a wrong type or out of bounds."""
    wrong: list[tuple[str, Any]] = []
    for name, field in options_schema(type(plugin)).items():
        kinds = {schema.get("type") for schema in _types(field)}
        for schema in _types(field):
            wrong += [(name, value) for value in _out_of_bounds(schema)]
            if "enum" in schema and kinds <= {"string", "null"}:
                wrong += [(name, "surely not an allowed value")]
        if kinds <= {"number", "integer", "null", "boolean"}:
            wrong += [(name, "no number"), (name, [])]
        if kinds & {"number", "integer"}:
            wrong += [(name, math.nan)]
    return wrong


def _out_of_bounds(schema: Mapping[str, Any]) -> Iterator[float]:
    yield from (schema[key] - 1 for key in ("minimum",) if key in schema)
    yield from (schema[key] + 1 for key in ("maximum",) if key in schema)
    yield from (schema[k] for k in ("exclusiveMinimum", "exclusiveMaximum") if k in schema)


def _drawn_options(plugin: gptk.Plugin) -> st.SearchStrategy[dict[str, Any]]:
    """Values within bounds for any of the options that are numbers, booleans, choices or texts."""
    known: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in options_schema(type(plugin)).items():
        if "enum" in field:
            known[name] = st.sampled_from(field["enum"])
        elif field.get("type") == "boolean":
            known[name] = st.booleans()
        elif field.get("type") == "string":
            known[name] = st.text(max_size=8)
        elif field.get("type") == "integer":
            low = field.get("minimum", field.get("exclusiveMinimum", -101) + 1)
            high = field.get("maximum", field.get("exclusiveMaximum", max(low, 0) + 101) - 1)
            known[name] = st.integers(low, high)
        elif field.get("type") == "number":
            low = field.get("minimum", field.get("exclusiveMinimum", -100.0))
            high = field.get("maximum", field.get("exclusiveMaximum", max(low, 0) + 100.0))
            known[name] = st.floats(
                low,
                high,
                exclude_min="exclusiveMinimum" in field,
                exclude_max="exclusiveMaximum" in field,
            )
    return st.fixed_dictionaries({}, optional=known)
