"""How plug-ins are found: through entry points of the group `gptk`, or registered by hand."""

import contextlib
import importlib
import importlib.metadata
import inspect
import itertools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from warnings import warn

import pluggy

from gptk.errors import (
    PluginError,
    UnknownNameError,
    brief,
    shown,
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
            with quiet():
                plugin = entry_point.load()
            warnings = _add(pm, plugin, origin)
            _load_failures.extend(f"a function of {origin}: {line}" for line in warnings)
        except INTERRUPTS:
            raise
        except BaseException as error:  # it may raise anything; the others go on
            _load_failures.append(f"{who}: {brief(error)}")
    return pm


INTERRUPTS = (KeyboardInterrupt, MemoryError)
"""What is no plug-in's fault, wherever it is raised."""


def quiet() -> contextlib.AbstractContextManager[object]:
    """Within it what a plug-in prints goes to standard error: others read the standard output."""
    return contextlib.redirect_stdout(sys.stderr)


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
            with quiet():
                returned = implementation.function()
                items = _as_list(returned)
        except INTERRUPTS:
            raise
        except BaseException as error:
            survey.failures.append(f"hook {hook} of {origin}: {brief(error)}")
            continue
        for item in items:
            if problem := item_problem(kind, item, _reserved_commands):
                survey.failures.append(f"hook {hook} of {origin}: {problem}")
            elif item.name in survey.known:
                first = survey.known[item.name]
                if first.item is not item:
                    survey.clashes[item.name] = _clash(first, origin)
            else:
                survey.known[item.name] = Provided(kind, item.name, item, origin)
    survey.known = dict(sorted(survey.known.items()))
    survey.failures += survey.clashes.values()
    return survey


def _clash(first: Provided, origin: str) -> str:
    """What to say of two plug-ins of one name; origin: that of the second."""
    both = f"two {KINDS[first.kind].plural} are called {first.name!r}"
    if first.distribution == origin:
        return f"{both}, both of {origin}; rename one"
    return f"{both}: one from {first.distribution}, one from {origin}; rename or uninstall one"


_MOST_ITEMS = 10_000
"""More that a hook returns are left out, so that one that does not end does no harm."""


def _as_list(returned: object) -> list[Any]:
    """What a hook returned. Raises PluginError for anything but a list of classes or commands."""
    if inspect.iscoroutine(returned):
        returned.close()
        raise PluginError("it is async, and gptk does not await it; write `def`")
    if isinstance(returned, type):
        name = returned.__name__
        raise PluginError(f"it returned the class {name}; return [{name}]")
    if isinstance(returned, str | Mapping) or not isinstance(returned, Iterable):
        raise PluginError(f"it returned {shown(returned)}, not a list")
    return list(itertools.islice(returned, _MOST_ITEMS))


def summary(item: Any) -> str:
    """The first line of a plug-in's or command's description."""
    text = inspect.getdoc(item) if isinstance(item, type) else getattr(item, "help", "")
    return (text or "").strip().partition("\n")[0]
