"""Making a plug-in from its spec string."""

from typing import TypeVar

from gptk.errors import (
    GptkError,
    OptionError,
    PluginError,
    brief,
)
from gptk.hooks.base import Plugin
from gptk.options import from_options
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import find
from gptk.spec import parse_spec

P = TypeVar("P", bound=Plugin)


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
    found = find(kind, name)
    try:
        plugin = from_options(found.item, options)
    except GptkError:
        raise
    except Exception as error:  # its validators, or an __init__ of its own
        raise PluginError(
            f"{found.item.title()} of {found.distribution} (hook {KINDS[kind].hook}) cannot be "
            f"made: {brief(error)}"
        ) from error
    assert isinstance(plugin, base)
    return plugin
