"""The plug-in system: the base class of plug-ins, how they are found, and how they are named.

Plug-ins come in through entry points of the group `gptk`, the built-in ones too. One that fails
to import is remembered in `failures()` and skipped.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pluggy
import pydantic

from gptk import hookspecs
from gptk.errors import OptionError, PluginError, UnknownNameError, suggest
from gptk.spec import format_spec, parse_spec

# Kind, as the user says it -> (the hook that provides it, its plural in messages).
KINDS = {
    "sampler": ("gptk_samplers", "samplers"),
    "processor": ("gptk_logits_processors", "logits processors"),
    "scheduler": ("gptk_lr_schedulers", "LR schedulers"),
    "regularizer": ("gptk_regularizers", "regularizers"),
    "loader": ("gptk_weight_loaders", "weight loaders"),
    "tokenizer": ("gptk_tokenizers", "tokenizers"),
    "command": ("gptk_commands", "commands"),
}


class Plugin(pydantic.BaseModel):
    """The base of everything a hook provides but commands: a name and typed, bounded options.

    Options are pydantic fields with default, bounds and a `description`; from that one
    declaration come validation, the spec string's parsing and `gptk plugins show NAME`.
    Instances are frozen, compare by value and can be shared. Wrong options raise OptionError.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    kind: ClassVar[str]
    example: ClassVar[str] = ""
    """Options worth showing, such as `width=4`; `gptk plugins show` makes a command of it."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except pydantic.ValidationError as error:
            raise OptionError(_explain(type(self), error)) from None

    @property
    def spec(self) -> str:
        """The spec string that makes this plug-in again: options at their default left out."""
        return format_spec(self.name, self.model_dump(exclude_defaults=True))


P = TypeVar("P", bound=Plugin)


@dataclass(frozen=True)
class Provided:
    """Something a hook returned, and whose it is."""

    kind: str
    name: str
    item: Any
    """A Plugin class, or a click.Command."""
    distribution: str
    """Name and version of the distribution, or the module where it was registered by hand."""


def register(plugin: object, *, origin: str | None = None) -> None:
    """Add a plug-in module or object that no entry point names, for this process.

    Raises PluginError, and leaves the plug-in out, if one of its names is taken.
    """
    _add(manager(), plugin, origin or str(getattr(plugin, "__name__", type(plugin).__name__)))
    _provided.cache_clear()
    try:
        for kind in KINDS:
            provided(kind)
    except PluginError:
        unregister(plugin)
        raise


def unregister(plugin: object) -> None:
    """Take out a plug-in that `register` added."""
    manager().unregister(plugin)
    _provided.cache_clear()


def provided(kind: str) -> dict[str, Provided]:
    """All there is of one kind, by name, in alphabetical order.

    Raises PluginError where two distributions claim one name.
    """
    return _provided(kind)


def failures() -> list[str]:
    """A line for each plug-in that could not be loaded or asked: whose, which, and why."""
    manager()
    for kind in KINDS:
        provided(kind)
    return list(_failures)


def create(kind: str, spec: "str | P", base: type[P]) -> P:
    """A plug-in of one kind from its spec string; an instance of `base` is returned as it is.

    Raises UnknownNameError (with the nearest names), SpecError or OptionError.
    """
    if isinstance(spec, base):
        return spec
    if not isinstance(spec, str):
        raise OptionError(f"a {kind} is a spec string or a {base.__name__}, not {spec!r}")
    name, options = parse_spec(spec)
    plugin = find(kind, name).item(**options)
    assert isinstance(plugin, base)
    return plugin


def find(kind: str, name: str) -> Provided:
    """The plug-in of that kind and name. Raises UnknownNameError with the nearest names."""
    known = provided(kind)
    if name not in known:
        raise UnknownNameError(
            f"no {kind} is called {name!r}; {suggest(name, known, what=KINDS[kind][1])}"
        )
    return known[name]


@functools.cache
def manager() -> pluggy.PluginManager:
    """The pluggy manager, with every installed plug-in that could be imported."""
    pm = pluggy.PluginManager("gptk")
    pm.add_hookspecs(hookspecs)
    for entry_point in importlib.metadata.entry_points(group="gptk"):
        dist = entry_point.dist
        origin = f"{dist.name} {dist.version}" if dist else entry_point.module
        try:
            _add(pm, entry_point.load(), origin)
        except Exception as error:  # a plug-in may raise anything; the others go on
            _failures.append(f"plug-in {entry_point.name} of {origin}: {_brief(error)}")
    return pm


_failures: list[str] = []
_origins: dict[int, str] = {}


def _add(pm: pluggy.PluginManager, plugin: object, origin: str) -> None:
    if not pm.is_registered(plugin):
        pm.register(plugin)
        _origins[id(plugin)] = origin


@functools.cache
def _provided(kind: str) -> dict[str, Provided]:
    hook, _ = KINDS[kind]
    known: dict[str, Provided] = {}
    # Each implementation is called by itself, so that one that fails is named and skipped.
    for implementation in getattr(manager().hook, hook).get_hookimpls():
        origin = _origins[id(implementation.plugin)]
        try:
            items = implementation.function()
        except Exception as error:
            line = f"hook {hook} of {origin}: {_brief(error)}"
            if line not in _failures:
                _failures.append(line)
            continue
        for item in items:
            if item.name in known:
                raise PluginError(
                    f"two {kind}s are called {item.name!r}: "
                    f"one from {known[item.name].distribution}, one from {origin}; uninstall one"
                )
            known[item.name] = Provided(kind, item.name, item, origin)
    return dict(sorted(known.items()))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def option_help(plugin: type[Plugin]) -> list[tuple[str, str, str, str]]:
    """The options of a plug-in class as (name, type and bounds, default, line of help)."""
    schema = (
        plugin.model_json_schema(mode="serialization")["properties"] if plugin.model_fields else {}
    )
    rows = []
    for name, field in plugin.model_fields.items():
        default = "required" if field.is_required() else _text(field.default)
        rows.append((name, _allowed(schema[name]), default, field.description or ""))
    return rows


def summary(item: Any) -> str:
    """The first line of a plug-in's or command's description."""
    text = inspect.getdoc(item) if isinstance(item, type) else getattr(item, "help", "")
    return (text or "").strip().partition("\n")[0]


_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}


def _allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words: `integer ≥ 1`, `true, false or never`."""
    if "anyOf" in schema:
        return " or ".join(_allowed(part) for part in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = {"boolean": "true or false", "null": "nothing"}.get(schema.get("type", ""), "")
    bounds = [form.format(schema[key]) for key, form in _BOUNDS.items() if key in schema]
    return " ".join([kind or schema.get("type", "any"), ", ".join(bounds)]).strip()


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(plugin: type[Plugin], error: pydantic.ValidationError) -> str:
    """A pydantic error as one line: what was given and what is allowed."""
    options = {name: (allowed, default) for name, allowed, default, _ in option_help(plugin)}
    who = f"{plugin.kind} {plugin.name}"
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{who} has no option {key!r}; {suggest(key, options, what='options')}"
    if first["type"] == "missing":
        return f"{who} needs the option {key} ({options[key][0]})"
    if key not in options:
        return f"{who}: {first['msg'].removeprefix('Value error, ')}"
    allowed, default = options[key]
    given = _text(first["input"])
    return f"{who}: {key}={given} is not allowed; {key} is {allowed} (default {default})"
