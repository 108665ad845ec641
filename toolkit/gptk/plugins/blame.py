"""Naming the plug-in whose code failed."""

import contextlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from gptk.distribution import NAME as DISTRIBUTION
from gptk.errors import GptkError, InternalError, PluginError, brief, shown
from gptk.hooks.base import Plugin
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import PluginWarning, provided
from gptk.system.memory import is_out_of_memory

T = TypeVar("T")


@contextlib.contextmanager
def blaming(plugins: Iterable[Plugin]) -> Iterator[None]:
    """Turn an exception that a plug-in's code raised into a PluginError that names the plug-in.

    plugins: those that run in this block. For a plug-in that gptk comes with it is an
    InternalError. Errors that gptk raises on purpose, errors in which no plug-in's code had a
    part, interrupts, and errors for lack of memory pass unchanged.
    """
    try:
        yield
    except GptkError:
        raise
    except BaseException as error:
        # no plug-in is to blame for a lack of memory, nor for functions that the caller passed
        if not _is_failure(error) or is_out_of_memory(error) or getattr(error, _CALLERS, False):
            raise
        if blamed := blame(error, plugins):
            kind = InternalError if blamed.is_gptks_own else PluginError
            raise kind(blamed.line) from error
        raise


def _is_failure(error: BaseException) -> bool:
    """Whether an error is a failure of the code that raises it, such as `sys.exit()` in a plug-in,
    and not the user's interrupt or the end of a generator or a task."""
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        return False
    return type(error).__name__ != "CancelledError"  # asyncio's, which takes long to import


@contextlib.contextmanager
def callers_code() -> Iterator[None]:
    """Within `blaming`: errors raised in this block are the caller's own, not a plug-in's."""
    try:
        yield
    except Exception as error:
        setattr(error, _CALLERS, True)
        raise


_CALLERS = "gptk_callers_code"


@dataclass(frozen=True)
class Blamed:
    """Whose fault an error is."""

    line: str
    """Names the plug-in and the error."""
    is_gptks_own: bool
    """The plug-in is one that gptk comes with."""

    @classmethod
    def of(cls, plugin: Plugin, failed: str) -> "Blamed":
        distribution, owner = _owner(plugin)
        report = to_report(distribution)
        return cls(f"{plugin.title()} of {owner} {failed}{report}", bool(report))


def blame(error: BaseException, plugins: Iterable[Plugin]) -> Blamed | None:
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
        module = frame.f_globals.get("__name__")
        failed = f"failed in {qualname}, line {line} of {module}: {brief(error)}"
        return Blamed.of(plugin, failed)
    if misfit := _misfit(error, callers[0] if callers else None, running):
        return Blamed.of(misfit, f"failed: {brief(error)}")
    return None


def _misfit(error: BaseException, caller: object, plugins: Iterable[Plugin]) -> Plugin | None:
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
            f"{plugin.title()} of {_owner(plugin)[1]}: {method}() returned {shown(value)}; it must "
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
    blamed = blame(error, [observer]) or Blamed.of(observer, f"failed: {brief(error)}")
    warnings.warn(f"{blamed.line}; it hears no more of this run", PluginWarning, stacklevel=2)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _owner(plugin: Plugin) -> tuple[str, str]:
    """The distribution that a plug-in comes from, and with the hook, for messages.

    For one that is not registered, the module that defines it, and no distribution.
    """
    known = provided(plugin.kind).get(plugin.name)
    if known is not None and known.item is type(plugin):
        return known.distribution, f"{known.distribution} (hook {KINDS[plugin.kind].hook})"
    return "", f"module {type(plugin).__module__}"


def to_report(distribution: str) -> str:
    """The end of a message on a plug-in of a distribution that gptk itself comes as."""
    own = distribution.partition(" ")[0] == DISTRIBUTION
    return "; this is a fault of gptk itself, please report it" if own else ""
