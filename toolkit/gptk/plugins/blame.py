"""Whose fault it is: naming the plug-in whose code failed."""

import contextlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

from gptk.errors import (
    GptkError,
    PluginError,
    brief,
    out_of_memory,
)
from gptk.hooks.base import Plugin
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import PluginWarning, Provided, provided

T = TypeVar("T")


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
