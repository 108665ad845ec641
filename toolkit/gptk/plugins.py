"""The plug-in system: the base class of plug-ins, how they are found, and how they are named.

Plug-ins come in through entry points of the group `gptk`, the built-in ones too. One that fails
to import is remembered in `failures()` and skipped; one that fails at work is named by `blaming`.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, ClassVar, TypeVar

import pluggy
import pydantic
import pydantic_core

from gptk import hookspecs
from gptk.errors import (
    GptkError,
    OptionError,
    PluginError,
    UnknownNameError,
    out_of_memory,
    suggest,
)
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
    "decoding-observer": Kind(
        "gptk_decoding_observers", "decoding observers", "gptk.observing:DecodingObserver"
    ),
    "scheduler": Kind("gptk_lr_schedulers", "LR schedulers", "gptk.training:LRScheduler"),
    "regularizer": Kind("gptk_regularizers", "regularizers", "gptk.training:Regularizer"),
    "training-observer": Kind(
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
        """The spec string that makes this plug-in again: options at their default left out.

        Raises OptionError if an option is an object that no text stands for.
        """
        try:
            options = self.model_dump(mode="json", exclude_defaults=True)
        except pydantic_core.PydanticSerializationError:
            raise OptionError(
                f"{self.title()} was made with an object and has no spec string"
            ) from None
        return format_spec(self.name, options)


P = TypeVar("P", bound=Plugin)
T = TypeVar("T")


@dataclass(frozen=True)
class Provided:
    """Something a hook returned, and whose it is."""

    kind: str
    name: str
    item: Any
    """A Plugin class, or a click.Command."""
    distribution: str
    """Name and version of the distribution, or the module where it was registered by hand."""


class PluginWarning(UserWarning):
    """A plug-in does something that can be passed over, such as to misspell a hook."""


def register(plugin: object, *, origin: str | None = None) -> None:
    """Add a plug-in module or object that no entry point names, for this process.

    Raises PluginError, and leaves the plug-in out, if it breaks a rule or a name is taken. Warns
    (PluginWarning) of a hook whose name gptk does not know.
    """
    origin = origin or str(getattr(plugin, "__name__", type(plugin).__name__))
    before = failures()
    for line in _add(manager(), plugin, origin):
        warnings.warn(line, PluginWarning, stacklevel=2)
    _survey.cache_clear()
    if new := [line for line in failures() if line not in before]:
        unregister(plugin)
        raise PluginError(new[0])


def register_file(path: str | os.PathLike[str]) -> ModuleType:
    """Import a single Python file as a plug-in module and `register` it, for this process.

    Returns the module, whose name is `gptk_file_` and the file's; a file that was registered
    before is read again. Raises PluginError, in one line, for a file that is not there, fails to
    import (with the line where), has no hook (with what to add), or breaks a rule.
    """
    file, origin = Path(path).absolute(), str(path)
    if file.suffix != ".py":
        raise PluginError(f"{origin} is not a .py file; a plug-in is a Python module")
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        raise PluginError(f"there is no file {origin}") from None
    except OSError as error:
        raise PluginError(f"{origin} cannot be read: {error.strerror}") from None
    module = ModuleType(_file_module(file))
    module.__file__ = str(file)
    before = sys.modules.pop(module.__name__, None)
    sys.modules[module.__name__] = module  # where classes look up what their annotations name
    try:
        _execute(module, source, origin)
        unregister(before)
        register(module, origin=origin)
    except PluginError as error:
        del sys.modules[module.__name__]
        if origin not in str(error):
            raise PluginError(f"{origin}: {error}") from error
        raise
    return module


def unregister(plugin: object) -> None:
    """Take out a plug-in that `register` added."""
    if manager().is_registered(plugin):
        manager().unregister(plugin)
        _survey.cache_clear()


def provided(kind: str) -> dict[str, Provided]:
    """All there is of one kind, by name, in alphabetical order."""
    return _survey(kind).known


def failures(kinds: Iterable[str] = KINDS) -> list[str]:
    """A line for each plug-in, hook or class that could not be taken: whose, which, and why.

    kinds: those whose hooks are called, if they have not been; by default all.
    """
    manager()
    return _load_failures + [line for kind in kinds for line in _survey(kind).failures]


def ask(one: Provided, method: str, *given: Any) -> Any:
    """What a plug-in's class method answers; None, with a warning, where it fails.

    For questions that all plug-ins of a kind are asked, so that one does not stop the others.
    """
    try:
        return getattr(one.item, method)(*given)
    except GptkError:
        raise
    except Exception as error:
        hook = KINDS[one.kind].hook
        warnings.warn(
            f"{one.item.title()} of {one.distribution} (hook {hook}) failed in {method}: "
            f"{brief(error)}",
            PluginWarning,
            stacklevel=2,
        )
        return None


@contextlib.contextmanager
def blaming(plugins: Iterable[Plugin]) -> Iterator[None]:
    """Name the plug-in whose code raised what comes out of the block, as a PluginError.

    plugins: those at work. What gptk raises on purpose, what no plug-in's code had a part in, and
    want of memory pass unchanged.
    """
    try:
        yield
    except (GptkError, MemoryError):
        raise
    except Exception as error:
        # torch's, and those of functions that are the caller's own
        if out_of_memory(error) or getattr(error, _CALLERS, False):
            raise
        if line := blame(error, plugins):
            raise PluginError(line) from error
        raise


@contextlib.contextmanager
def not_of_a_plugin() -> Iterator[None]:
    """Within `blaming`: what comes out of this block is not to be laid at a plug-in's door."""
    try:
        yield
    except Exception as error:
        setattr(error, _CALLERS, True)
        raise


_CALLERS = "gptk_callers_own"


def blame(error: Exception, plugins: Iterable[Plugin]) -> str | None:
    """Which plug-in's code was the last to run before the error, in a line; None for nobody's.

    plugins: those at work; those that these call are found as well.
    """
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    callers = [frame.f_locals.get("self") for frame, _ in frames]
    at_work = [*plugins, *(one for one in callers if isinstance(one, Plugin))]
    for index, (frame, line) in enumerate(frames):
        suspects = _suspects(frame, at_work)
        if not suspects:
            continue
        # Several may stand in one module, and share what is beside them there.
        qualname = frame.f_code.co_qualname
        own = [one for one in suspects if qualname.startswith(f"{type(one).__qualname__}.")]
        calling = [one for caller in callers[index:] for one in suspects if one is caller]
        plugin = [*own, *calling, *suspects][0]
        return (
            f"{type(plugin).title()} of {_owner(plugin)} failed in {qualname}, line {line} of "
            f"{frame.f_globals.get('__name__')}: {brief(error)}"
        )
    if misfit := _misfit(error, callers[0] if callers else None, at_work):
        return f"{misfit.title()} of {_owner(misfit)} failed: {brief(error)}"
    return None


def _misfit(error: Exception, caller: object, plugins: Iterable[Plugin]) -> Plugin | None:
    """The plug-in that lacks what gptk called, or takes other arguments: none of its code ran."""
    if isinstance(caller, Plugin):  # its base class's code was the last to run
        return caller
    called = re.match(r"(\S+)\(\) ", str(error)) if isinstance(error, TypeError) else None
    if called is None:
        return None
    for plugin in plugins:
        module = type(plugin).__module__
        item: object = sys.modules.get(module)
        for name in called[1].split("."):
            item = getattr(item, name, None)
        inside = called[1].startswith(f"{type(plugin).__qualname__}.")
        if inside or getattr(item, "__module__", None) == module:
            return plugin
    return None


def expect(plugin: Plugin, method: str, value: T, kinds: Any, wanted: str) -> T:
    """The value that a plug-in's method returned. Raises PluginError if it is none of `kinds`."""
    if not isinstance(value, kinds):
        raise PluginError(
            f"{plugin.title()} of {_owner(plugin)}: {method}() returned {value!r:.60}; it must "
            f"return {wanted}"
        )
    return value


def _suspects(frame: FrameType, plugins: Sequence[Plugin]) -> list[Plugin]:
    """The plug-ins whose module a frame is in, or else those whose package it is in."""
    module = frame.f_globals.get("__name__", "")
    if _package(module) == "gptk":
        return []
    return [one for one in plugins if type(one).__module__ == module] or [
        one for one in plugins if _package(type(one).__module__) == _package(module)
    ]


def warn_of_failure(observer: Plugin, error: Exception) -> None:
    """A PluginWarning for an observer that failed; whatever it observes goes on without it."""
    line = blame(error, [observer])
    line = line or f"{observer.title()} of {_owner(observer)} failed: {brief(error)}"
    warnings.warn(f"{line}; it hears no more of this run", PluginWarning, stacklevel=2)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _owner(plugin: Plugin) -> str:
    """The distribution and hook that a plug-in came by, or the module that defines it."""
    known = provided(plugin.kind).get(plugin.name)
    if known is not None and known.item is type(plugin):
        return f"{known.distribution} (hook {KINDS[plugin.kind].hook})"
    return f"module {type(plugin).__module__}"


def create(kind: str, spec: "str | P", base: type[P]) -> P:
    """A plug-in of one kind from its spec string; an instance of `base` is returned as it is.

    Options that are neither text nor numbers are written as JSON, `tokens="[1, 2]"`.
    Raises UnknownNameError (with the nearest names), SpecError, OptionError, or PluginError for
    a name that two distributions claim or a class that fails.
    """
    if isinstance(spec, base):
        return spec
    if not isinstance(spec, str):
        raise OptionError(f"a {kind} is a spec string or a {base.__name__}, not {spec!r}")
    name, options = parse_spec(spec)
    one = find(kind, name)
    try:
        made = from_options(one.item, options)
    except GptkError:
        raise
    except Exception as error:  # its validators, or an __init__ of its own
        raise PluginError(
            f"{one.item.title()} of {one.distribution} (hook {KINDS[kind].hook}) cannot be made: "
            f"{brief(error)}"
        ) from error
    assert isinstance(made, base)
    return made


def from_options(plugin: type[P], options: Mapping[str, str]) -> P:
    """A plug-in of a class with its options as a spec string has them. Raises OptionError."""
    fields = plugin.model_fields
    typed = {
        key: from_text(text) if key in fields and fields[key].annotation is not str else text
        for key, text in options.items()
    }
    return plugin(**typed)


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
        who = f"plug-in {entry_point.name} of {origin}"
        try:
            passed_over = _add(pm, entry_point.load(), origin)
            _load_failures.extend(f"a function of {origin}: {line}" for line in passed_over)
        except (Exception, SystemExit) as error:  # it may raise anything; the others go on
            _load_failures.append(f"{who}: {brief(error)}")
    return pm


_load_failures: list[str] = []
_origins: dict[int, str] = {}


def _add(pm: pluggy.PluginManager, plugin: object, origin: str) -> list[str]:
    """Register a plug-in; returns a line for each of its functions that only seems to be a hook.

    Raises PluginError if it was built for another version of the hooks, or has none.
    """
    if pm.is_registered(plugin):
        return []
    built_for = getattr(plugin, "GPTK_API", hookspecs.API_VERSION)
    if not isinstance(built_for, int):
        raise PluginError(
            f"GPTK_API is {built_for!r}; it must be the version of gptk's hooks that the plug-in "
            f"was built for, a whole number such as {hookspecs.API_VERSION}"
        )
    if built_for != hookspecs.API_VERSION:
        raise PluginError(
            f"it was built for version {built_for} of gptk's hooks, and this gptk has version "
            f"{hookspecs.API_VERSION}; install a version of it that says GPTK_API = "
            f"{hookspecs.API_VERSION}"
        )
    if not set(_marked(plugin)) & {kind.hook for kind in KINDS.values()}:
        raise PluginError(_missing_hook(plugin))
    passed_over = _unknown_hooks(plugin) + _unmarked_hooks(plugin)
    for name in _marked(plugin):
        parameters = list(inspect.signature(getattr(plugin, name)).parameters)
        if parameters and name in {kind.hook for kind in KINDS.values()}:
            raise PluginError(
                f"the hook {name} takes no arguments; this one has {', '.join(parameters)}"
            )
    pm.register(plugin)
    _origins[id(plugin)] = origin
    return passed_over


def _marked(plugin: object) -> list[str]:
    """The names in a plug-in that are marked as implementations of hooks."""
    return [name for name in dir(plugin) if getattr(getattr(plugin, name, None), "gptk_impl", None)]


def _unknown_hooks(plugin: object) -> list[str]:
    hooks = {kind.hook for kind in KINDS.values()}
    return [
        f"there is no hook {name}; {suggest(name, hooks, what='hooks')}"
        for name in _marked(plugin)
        if name not in hooks
    ]


def _unmarked_hooks(plugin: object) -> list[str]:
    marked = _marked(plugin)
    return [
        f"{kind.hook} is not marked as a hook; write @gptk.hookimpl above it"
        for kind in KINDS.values()
        if kind.hook not in marked and callable(getattr(plugin, kind.hook, None))
    ]


def _file_module(file: Path) -> str:
    """The module name of a file: always the same, and no other module's."""
    name = f"gptk_file_{file.parent.name if file.stem == '__init__' else file.stem}"
    while getattr(sys.modules.get(name), "__file__", str(file)) != str(file):
        name += "_"
    return name


def _execute(module: ModuleType, source: bytes, origin: str) -> None:
    """Fill a module from its file's source. Raises PluginError if it fails."""
    file = str(module.__file__)
    try:
        # Compiled here and not by importlib, which would leave a __pycache__ beside the file.
        exec(compile(source, file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        problem = brief(error)
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            problem, lines = f"{type(error).__name__}: {error.msg}", [error.lineno or 1]
        where = f", line {lines[-1]}" if lines else ""
        raise PluginError(f"{origin}{where}: {problem}") from error


def _missing_hook(plugin: object) -> str:
    """What is wrong with a plug-in without hooks, and what to add."""
    if wrong := [*_unknown_hooks(plugin), *_unmarked_hooks(plugin)]:
        return f"it has no hook of gptk's: {wrong[0]}"
    for name, item in getattr(plugin, "__dict__", {}).items():
        own = isinstance(item, type) and item.__module__ == getattr(plugin, "__name__", None)
        if own and issubclass(item, Plugin) and getattr(item, "kind", None) in KINDS:
            hook, returned = KINDS[item.kind].hook, f"[{name}]"
            break
    else:
        hook, returned = "gptk_samplers", "a list of its classes"
    return (
        f"it has no hook, so gptk finds nothing in it; add a function {hook}() that returns "
        f"{returned}, with @gptk.hookimpl above it"
    )


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
            returned = implementation.function()
            if isinstance(returned, type) or not isinstance(returned, Iterable):
                raise PluginError(f"it returned {returned!r:.60}, not a list")
            items: list[Any] = list(returned)
        except Exception as error:
            survey.failures.append(f"hook {hook} of {origin}: {brief(error)}")
            continue
        for item in items:
            if problem := _problem(kind, item):
                survey.failures.append(f"hook {hook} of {origin}: {problem}")
            elif item.name in survey.known:
                survey.clashes[item.name] = (
                    f"two {KINDS[kind].plural} are called {item.name!r}: one from "
                    f"{survey.known[item.name].distribution}, one from {origin}; rename or "
                    "uninstall one"
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
    try:
        plugin: type[Plugin] = item
        plugin.model_rebuild()  # where an annotation names what came later, or nothing
    except pydantic.errors.PydanticUndefinedAnnotation as error:
        return f"an option of {item.__name__} has the type {error.name}, which is not defined"
    return None


def brief(error: BaseException) -> str:
    """An error in a line: what gptk raised on purpose in its words, others by their type, too."""
    text = str(error) if isinstance(error, GptkError) else ""
    text = text or f"{type(error).__name__}: {error}"
    return text.splitlines()[0].removesuffix(": ")


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


def _explain(plugin: type[Options], error: pydantic.ValidationError) -> str:
    """A pydantic error as one line: what was given and what is allowed."""
    options = {name: (allowed, default) for name, allowed, default, _ in option_help(plugin)}
    who = plugin.title()
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{who} has no option {key!r}; {suggest(key, options, what='options')}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{who} needs the option {key} ({options[key][0]})"
    if key not in options:
        return f"{who}: {first['msg'].removeprefix('Value error, ')}"
    allowed, default = options[key]
    given = _text(first["input"])
    otherwise = "" if plugin.model_fields[key].is_required() else f" (default {default})"
    return f"{who}: {key}={given} is not allowed; {key} is {allowed}{otherwise}"
