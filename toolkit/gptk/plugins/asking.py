"""Questions put to all plug-ins of a kind, such as which of them takes a source."""

import warnings
from typing import Any, TypeVar

from gptk.errors import GptkError, PluginError, brief, shown
from gptk.hooks.base import Plugin
from gptk.plugins.blame import to_report
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import PluginWarning, Provided, provided

P = TypeVar("P", bound=Plugin)


def matching(kind: str, source: object, base: type[P], method: str = "matches") -> P | None:
    """The plug-in of the first class whose `matches` takes a source; None if there is none.

    method: the class method to ask instead of `matches`.

    Raises what `from_source` of that class raises, or a PluginError that names the class.
    """
    for plugin in provided(kind).values():
        if ask(plugin, method, source, answer=object):
            return _made_from(plugin, source, base)
    return None


def ask(plugin: Provided, method: str, *arguments: Any, answer: type) -> Any:
    """What a plug-in's class method answers; None, with a warning, where it fails.

    So a plug-in that fails does not stop the others. answer: the type that an answer other than
    None has; of `object` it is asked whether it is true.
    """
    try:
        answered = getattr(plugin.item, method)(*arguments)
        if answer is object:
            return bool(answered)
        if answered is not None and not isinstance(answered, answer):
            raise TypeError(f"it returned {shown(answered)}, not a {answer.__name__}")
        return answered
    except GptkError:
        raise
    except OSError:  # the system refuses a path, such as one that is too long
        return None
    except Exception as error:
        line = f"{_named(plugin)} failed in {method}: {brief(error)}"
        warnings.warn(line + to_report(plugin.distribution), PluginWarning, stacklevel=2)
        return None


def _made_from(plugin: Provided, source: object, base: type[P]) -> P:
    try:
        made = plugin.item.from_source(source)
    except GptkError:
        raise
    except Exception as error:
        raise PluginError(f"{_named(plugin)} failed in from_source: {brief(error)}") from error
    if not isinstance(made, base):
        raise PluginError(
            f"{_named(plugin)}: from_source() returned {shown(made)}; it must return a "
            f"gptk.{base.__name__}"
        )
    return made


def _named(plugin: Provided) -> str:
    return f"{plugin.item.title()} of {plugin.distribution} (hook {KINDS[plugin.kind].hook})"
