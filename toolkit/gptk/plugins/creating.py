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
from gptk.plugins.checks import misgiven
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import find
from gptk.spec import format_value, parse_spec

P = TypeVar("P", bound=Plugin)


def create(kind: str, spec: "str | P", base: type[P]) -> P:
    """A plug-in of one kind from its spec string; an instance of `base` is returned as it is.

    Options that are neither text nor numbers are written as JSON, `tokens=[1, 2]`; the option
    that the class declares as `positional` may come first without its name, `beam:4`.
    Raises UnknownNameError (with the nearest names), SpecError, OptionError, or PluginError for
    a name that two distributions claim or a class that fails.
    """
    if isinstance(spec, base):
        return spec
    if not isinstance(spec, str):
        raise OptionError(misgiven(kind, spec, base))
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


def short_form(plugin: type[Plugin]) -> str | None:
    """A spec string with an option that is given without its name, for help; None if none may be.

    >>> from gptk.plugins.registry import find
    >>> short_form(find("sampler", "top-p").item)
    'top-p:0.9'
    """
    if not plugin.positional:
        return None
    options = parse_spec(f"{plugin.name}:{plugin.example}")[1] if plugin.example else {}
    option = plugin.model_fields[plugin.positional]
    value: object = options.get(plugin.positional)
    if value is None and not option.is_required() and option.default is not None:
        value = option.get_default(call_default_factory=True, validated_data={})
    return f"{plugin.name}:{format_value(value)}" if value is not None else None
