"""Naming the plug-in whose code failed."""

import contextlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

from gptk.errors import GptkError, PluginError, brief
from gptk.hooks.base import Plugin
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import PluginWarning, Provided, provided
from gptk.system.memory import is_out_of_memory

T = TypeVar("T")


def ask(plugin: Provided, method: str, *arguments: Any) -> Any:
    """What a plug-in's class method returns; None, with a warning, where it fails.

    For questions put to all plug-ins of a kind, so that one that fails does not stop the others.
    """
    try:
        return getattr(plugin.item, method)(*arguments)
    except GptkError:
        raise
    except Exception as error:
        hook = KINDS[plugin.kind].hook
        warnings.warn(
            f"{plugin.item.title()} of {plugin.distribution} (hook {hook}) failed in {method}: "
            f"{brief(error)}",
            PluginWarning,
            stacklevel=2,
        )
        return None


@contextlib.contextmanager
def blaming(plugins: Iterable[Plugin]) -> Iterator[None]:
    """Turn an exception that a plug-in's code raised into a PluginError that names the plug-in.

    plugins: those that run in this block. Errors that gptk raises on purpose, errors in which no
    plug-in's code had a part, and errors for lack of memory pass unchanged.
    """
    try:
        yield
    except GptkError:
        raise
    except Exception as error:
        # no plug-in is to blame for a lack of memory, nor for functions that the caller passed
        if is_out_of_memory(error) or getattr(error, _CALLERS, False):
            raise
        if line := blame(error, plugins):
            raise PluginError(line) from error
        raise


@contextlib.contextmanager
def callers_code() -> Iterator[None]:
    """Within `blaming`: errors raised in this block are the caller's own, not a plug-in's."""
    try:
        yield
    except Exception as error:
        setattr(error, _CALLERS, True)
        raise


_CALLERS = "gptk_callers_code"


def blame(error: Exception, plugins: Iterable[Plugin]) -> str | None:
    """A line that names the plug-in whose code was the last to run before the error, or None.

    plugins: those that were running; plug-ins that these called are found as well.
    """
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    callers = [frame.f_locals.get("self") for frame, _ in frames]
    running = [*plugins, *(caller for caller in callers if isinstance(caller, Plugin))]
    for index, (frame, line) in enumerate(frames):
        suspects = _suspects(frame, running)
        if not suspects:
            continue
        # A module may define several plug-ins, which share its functions.
        qualname = frame.f_code.co_qualname
        defining = [p for p in suspects if qualname.startswith(f"{type(p).__qualname__}.")]
        calling = [p for caller in callers[index:] for p in suspects if p is caller]
        plugin = [*defining, *calling, *suspects][0]
        return (
            f"{type(plugin).title()} of {_owner(plugin)} failed in {qualname}, line {line} of "
            f"{frame.f_globals.get('__name__')}: {brief(error)}"
        )
    if misfit := _misfit(error, callers[0] if callers else None, running):
        return f"{misfit.title()} of {_owner(misfit)} failed: {brief(error)}"
    return None


def _misfit(error: Exception, caller: object, plugins: Iterable[Plugin]) -> Plugin | None:
    """The plug-in that lacks a method that gptk called, or takes other arguments.

    None of the plug-in's own code has run then.
    """
    if isinstance(caller, Plugin):  # the code of its base class was the last to run
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


def expect(plugin: Plugin, method: str, value: T, types: Any, wanted: str) -> T:
    """The value that a plug-in's method returned. Raises PluginError if it is none of `types`."""
    if not isinstance(value, types):
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
    return [p for p in plugins if type(p).__module__ == module] or [
        p for p in plugins if _package(type(p).__module__) == _package(module)
    ]


def warn_of_failure(observer: Plugin, error: Exception) -> None:
    """Warn (PluginWarning) of an observer that failed; the run goes on without it."""
    line = blame(error, [observer])
    line = line or f"{observer.title()} of {_owner(observer)} failed: {brief(error)}"
    warnings.warn(f"{line}; it hears no more of this run", PluginWarning, stacklevel=2)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _owner(plugin: Plugin) -> str:
    """The distribution and hook that a plug-in comes from, or the module that defines it."""
    known = provided(plugin.kind).get(plugin.name)
    if known is not None and known.item is type(plugin):
        return f"{known.distribution} (hook {KINDS[plugin.kind].hook})"
    return f"module {type(plugin).__module__}"
