"""How plug-ins are found: through entry points of the group `gptk`, or registered by hand."""

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from warnings import warn

import pluggy

from gptk.errors import (
    PluginError,
    UnknownNameError,
    brief,
    suggest,
)
from gptk.hooks import hookspecs
from gptk.plugins.checks import check_hooks, item_problem, unknown_hooks, unmarked_hooks
from gptk.plugins.kinds import KINDS
from gptk.system.once import computed_once

API_VERSION = hookspecs.API_VERSION
"""The version of the hooks, which a plug-in built for it states as GPTK_API."""


@dataclass(frozen=True)
class Provided:
    """A class or command that a hook returned, and the distribution that it belongs to."""

    kind: str
    name: str
    item: Any
    """A Plugin class, or a click.Command."""
    distribution: str
    """Name and version of the distribution, or the module where it was registered by hand."""


class PluginWarning(UserWarning):
    """A plug-in has a mistake that does not stop it, such as a misspelt hook."""


def register(plugin: object, *, origin: str | None = None) -> None:
    """Add a plug-in module or object that no entry point names, for this process.

    Raises PluginError, and leaves the plug-in out, if it breaks a rule or a name is taken. Warns
    (PluginWarning) of a hook whose name gptk does not know.
    """
    origin = origin or str(getattr(plugin, "__name__", type(plugin).__name__))
    before = failures()
    for line in _add(manager(), plugin, origin):
        warn(line, PluginWarning, stacklevel=2)
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
    """Refuse plug-ins' commands with these names, which are those of gptk's own commands."""
    if not _reserved_commands.issuperset(names):
        _reserved_commands.update(names)
        _survey.cache_clear()


def provided(kind: str) -> dict[str, Provided]:
    """All plug-ins of a kind, by name, in alphabetical order."""
    return _survey(kind).known


def failures(kinds: Iterable[str] = KINDS) -> list[str]:
    """A line for each plug-in, hook or class that was skipped: its distribution, and why.

    kinds: those to report, by default all. Their hooks are called unless they have been before.
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


@computed_once
def manager() -> pluggy.PluginManager:
    """The pluggy manager, with every installed plug-in that could be imported."""
    pm = pluggy.PluginManager("gptk")
    pm.add_hookspecs(hookspecs)
    for entry_point in importlib.metadata.entry_points(group="gptk"):
        dist = entry_point.dist
        origin = f"{dist.name} {dist.version}" if dist else entry_point.module
        who = f"plug-in {entry_point.name} of {origin}"
        try:
            warnings = _add(pm, entry_point.load(), origin)
            _load_failures.extend(f"a function of {origin}: {line}" for line in warnings)
        except (Exception, SystemExit) as error:  # it may raise anything; the others go on
            _load_failures.append(f"{who}: {brief(error)}")
    return pm


_reserved_commands: set[str] = set()
_load_failures: list[str] = []
_origins: dict[int, str] = {}


def _add(pm: pluggy.PluginManager, plugin: object, origin: str) -> list[str]:
    """Register a plug-in; returns a line for each of its functions that looks like a hook, but
    is none.

    Raises PluginError if it was built for another version of the hooks, or has none.
    """
    if pm.is_registered(plugin):
        return []
    check_hooks(plugin, API_VERSION)
    warnings = unknown_hooks(plugin) + unmarked_hooks(plugin)
    pm.register(plugin)
    _origins[id(plugin)] = origin
    return warnings


@dataclass
class _Survey:
    """The plug-ins of one kind, and why others were skipped."""

    known: dict[str, Provided] = field(default_factory=dict)
    clashes: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@computed_once
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
            if problem := item_problem(kind, item, _reserved_commands):
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


def summary(item: Any) -> str:
    """The first line of a plug-in's or command's description."""
    text = inspect.getdoc(item) if isinstance(item, type) else getattr(item, "help", "")
    return (text or "").strip().partition("\n")[0]
