"""The plug-in system: the base class of plug-ins, how they are found, and how they are named.

Plug-ins come in through entry points of the group `gptk`, the built-in ones too. One that fails
to import is remembered in `failures()` and skipped.
"""

import functools
import importlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pluggy
import pydantic

from gptk import hookspecs
from gptk.errors import OptionError, PluginError, UnknownNameError, suggest
from gptk.spec import NAME, format_spec, parse_spec


@dataclass(frozen=True)
class Kind:
    """A kind of plug-in."""

    hook: str
    plural: str
    """As messages say it."""
    base: str
    """Where its base class is: `module:name`."""

    def base_class(self) -> type:
        module, _, name = self.base.partition(":")
        base = getattr(importlib.import_module(module), name)
        assert isinstance(base, type)
        return base


KINDS = {
    "sampler": Kind("gptk_samplers", "samplers", "gptk.sampling:Sampler"),
    "processor": Kind(
        "gptk_logits_processors", "logits processors", "gptk.sampling:LogitsProcessor"
    ),
    "drafter": Kind("gptk_drafters", "drafters", "gptk.drafting:Drafter"),
    "scorer": Kind("gptk_scorers", "scorers", "gptk.sampling:Scorer"),
    "scheduler": Kind("gptk_lr_schedulers", "LR schedulers", "gptk.training:LRScheduler"),
    "regularizer": Kind("gptk_regularizers", "regularizers", "gptk.training:Regularizer"),
    "observer": Kind(
        "gptk_training_observers", "training observers", "gptk.training:TrainingObserver"
    ),
    "loader": Kind("gptk_weight_loaders", "weight loaders", "gptk.weights:WeightLoader"),
    "writer": Kind("gptk_weight_writers", "weight writers", "gptk.weights:WeightWriter"),
    "tokenizer": Kind("gptk_tokenizers", "tokenizers", "gptk.tokenizer:TokenizerLoader"),
    "command": Kind("gptk_commands", "commands", "click:Command"),
}
"""By the word that users say."""


class Options(pydantic.BaseModel):
    """Typed, bounded options: pydantic fields with default, bounds and a `description`.

    From that one declaration come validation, parsing and help. Instances are frozen, compare by
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
        """Whose options these are, as messages say it."""
        raise NotImplementedError


class Plugin(Options):
    """The base of everything a hook provides but commands: a name, and options.

    `gptk plugins show NAME` and the parsing of spec strings rest on the options' declaration.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    example: ClassVar[str] = ""
    """Options worth showing, such as `width=4`; `gptk plugins show` makes a command of it."""

    @classmethod
    def title(cls) -> str:
        return f"{cls.kind} {cls.name}"

    def __setattr__(self, name: str, value: Any) -> None:
        raise PluginError(
            f"{self.kind} {self.name} cannot be changed: it may serve several calls at once. A "
            "processor keeps state in the object that start() returns"
        )

    @property
    def spec(self) -> str:
        """The spec string that makes this plug-in again: options at their default left out."""
        return format_spec(self.name, self.model_dump(mode="json", exclude_defaults=True))


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

    Raises PluginError, and leaves the plug-in out, if it breaks a rule or a name is taken.
    """
    origin = origin or str(getattr(plugin, "__name__", type(plugin).__name__))
    before = failures()
    _add(manager(), plugin, origin)
    _survey.cache_clear()
    if new := [line for line in failures() if line not in before]:
        unregister(plugin)
        raise PluginError(new[0])


def unregister(plugin: object) -> None:
    """Take out a plug-in that `register` added."""
    if manager().is_registered(plugin):
        manager().unregister(plugin)
        _survey.cache_clear()


def provided(kind: str) -> dict[str, Provided]:
    """All there is of one kind, by name, in alphabetical order."""
    return _survey(kind).known


def failures() -> list[str]:
    """A line for each plug-in, hook or class that could not be taken: whose, which, and why."""
    manager()
    return _load_failures + [line for kind in KINDS for line in _survey(kind).failures]


def create(kind: str, spec: "str | P", base: type[P]) -> P:
    """A plug-in of one kind from its spec string; an instance of `base` is returned as it is.

    Options that are neither text nor numbers are written as JSON, `tokens="[1, 2]"`.
    Raises UnknownNameError (with the nearest names), SpecError, OptionError, or PluginError for
    a name that two distributions claim.
    """
    if isinstance(spec, base):
        return spec
    if not isinstance(spec, str):
        raise OptionError(f"a {kind} is a spec string or a {base.__name__}, not {spec!r}")
    name, options = parse_spec(spec)
    plugin = find(kind, name).item
    fields = plugin.model_fields
    typed = {
        key: from_text(text) if key in fields and fields[key].annotation is not str else text
        for key, text in options.items()
    }
    made = plugin(**typed)
    assert isinstance(made, base)
    return made


def from_text(text: str) -> object:
    """An option's value as it was typed: JSON for lists, objects and null."""
    if text[:1] in "[{" or text == "null":
        try:
            # A spec string's own escapes may have made line breaks of \n already.
            return json.loads(text, strict=False)
        except ValueError:
            pass
    return text  # pydantic makes numbers and the like of it


def find(kind: str, name: str) -> Provided:
    """The plug-in of that kind and name.

    Raises UnknownNameError with the nearest names, or PluginError if two distributions claim it.
    """
    survey = _survey(kind)
    if name in survey.clashes:
        raise PluginError(survey.clashes[name])
    if name not in survey.known:
        raise UnknownNameError(
            f"no {kind} is called {name!r}; {suggest(name, survey.known, what=KINDS[kind].plural)}"
        )
    return survey.known[name]


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
        except (Exception, SystemExit) as error:  # it may raise anything; the others go on
            _load_failures.append(f"plug-in {entry_point.name} of {origin}: {_brief(error)}")
    return pm


_load_failures: list[str] = []
_origins: dict[int, str] = {}


def _add(pm: pluggy.PluginManager, plugin: object, origin: str) -> None:
    if pm.is_registered(plugin):
        return
    hooks = {kind.hook for kind in KINDS.values()}
    for name in dir(plugin):
        if getattr(getattr(plugin, name, None), "gptk_impl", None) and name not in hooks:
            raise PluginError(f"there is no hook {name}; {suggest(name, hooks, what='hooks')}")
    pm.register(plugin)
    _origins[id(plugin)] = origin


@dataclass
class _Survey:
    """All that plug-ins provide of one kind, and what was wrong with the rest."""

    known: dict[str, Provided] = field(default_factory=dict)
    clashes: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@functools.cache
def _survey(kind: str) -> _Survey:
    hook = KINDS[kind].hook
    survey = _Survey()
    # Each implementation is called by itself, so that one that fails is named and skipped.
    for implementation in getattr(manager().hook, hook).get_hookimpls():
        origin = _origins[id(implementation.plugin)]
        try:
            items: list[Any] = list(implementation.function())
        except Exception as error:
            survey.failures.append(f"hook {hook} of {origin}: {_brief(error)}")
            continue
        for item in items:
            if problem := _problem(kind, item):
                survey.failures.append(f"hook {hook} of {origin}: {problem}")
            elif item.name in survey.known:
                survey.clashes[item.name] = (
                    f"two {KINDS[kind].plural} are called {item.name!r}: one from "
                    f"{survey.known[item.name].distribution}, one from {origin}; uninstall one"
                )
            else:
                survey.known[item.name] = Provided(kind, item.name, item, origin)
    survey.known = dict(sorted(survey.known.items()))
    survey.failures += survey.clashes.values()
    return survey


def _problem(kind: str, item: Any) -> str | None:
    """Why something cannot be a plug-in of that kind, or None."""
    base: Any = KINDS[kind].base_class()
    if kind == "command":
        from gptk.cli import COMMANDS

        if not isinstance(item, base):
            return f"{item!r} is not a click command"
        if item.name in COMMANDS:
            return f"gptk has a command {item.name} of its own"
        return None
    if not (isinstance(item, type) and issubclass(item, base)):
        return f"{item!r} is not a subclass of gptk.{base.__name__}"
    name = item.__dict__.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return (
            f"{item.__name__} has the name {name!r}; give it a class attribute `name` of letters, "
            "digits, dots and hyphens"
        )
    return None


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def option_help(plugin: type[Options]) -> list[tuple[str, str, str, str]]:
    """The options of a class as (name, type and bounds, default, line of help)."""
    try:
        schema = plugin.model_json_schema(by_alias=False)
    except pydantic.errors.PydanticInvalidForJsonSchema:
        schema = {}
    rows = []
    for name, option in plugin.model_fields.items():
        allowed = _allowed(schema.get("properties", {}).get(name, {}), schema.get("$defs", {}))
        default = "required"
        if not option.is_required():
            default = _text(option.get_default(call_default_factory=True, validated_data={}))
        rows.append((name, allowed, default, option.description or ""))
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
    "pattern": "like {}",
    "minLength": "of {} characters or more",
    "maxLength": "of {} characters at most",
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


def _explain(plugin: type[Options], error: pydantic.ValidationError) -> str:
    """A pydantic error as one line: what was given and what is allowed."""
    options = {name: (allowed, default) for name, allowed, default, _ in option_help(plugin)}
    who = plugin.title()
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
