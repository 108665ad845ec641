"""How plug-ins are found: through entry points of the group `gptk`, or registered by hand."""

import functools
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pluggy
import pydantic

from gptk.errors import (
    PluginError,
    UnknownNameError,
    brief,
    suggest,
)
from gptk.hooks import hookspecs
from gptk.hooks.base import Plugin
from gptk.plugins.kinds import KINDS
from gptk.spec import NAME


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


def unregister(plugin: object) -> None:
    """Take out a plug-in that `register` added."""
    if manager().is_registered(plugin):
        manager().unregister(plugin)
        _survey.cache_clear()


def reserve_commands(names: Iterable[str]) -> None:
    """Refuse these names to plug-ins' commands from now on: the program has them itself."""
    if not _reserved_commands.issuperset(names):
        _reserved_commands.update(names)
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


_reserved_commands: set[str] = set()
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
    base: Any = KINDS[kind].base
    if kind == "command":
        if not isinstance(item, base):
            return f"{item!r} is not a click command"
        if item.name in _reserved_commands:
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


def summary(item: Any) -> str:
    """The first line of a plug-in's or command's description."""
    text = inspect.getdoc(item) if isinstance(item, type) else getattr(item, "help", "")
    return (text or "").strip().partition("\n")[0]
