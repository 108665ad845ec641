"""Checks of a plug-in module, its hooks, and what these return."""

import inspect
from collections.abc import Collection
from typing import Any

import pydantic

from gptk.errors import PluginError, suggest
from gptk.hooks.base import Plugin
from gptk.plugins.kinds import KINDS
from gptk.spec import NAME


def check_hooks(plugin: object, version: int) -> None:
    """Raises PluginError for a plug-in without a valid hook, or of another version of the hooks."""
    built_for = getattr(plugin, "GPTK_API", version)
    if not isinstance(built_for, int):
        raise PluginError(
            f"GPTK_API is {built_for!r}; it must be the version of gptk's hooks that the plug-in "
            f"was built for, a whole number such as {version}"
        )
    if built_for != version:
        raise PluginError(
            f"it was built for version {built_for} of gptk's hooks, and this gptk has version "
            f"{version}; install a version of it that says GPTK_API = "
            f"{version}"
        )
    if not set(_marked(plugin)) & {kind.hook for kind in KINDS.values()}:
        raise PluginError(_missing_hook(plugin))
    for name in _marked(plugin):
        parameters = list(inspect.signature(getattr(plugin, name)).parameters)
        if parameters and name in {kind.hook for kind in KINDS.values()}:
            raise PluginError(
                f"the hook {name} takes no arguments; this one has {', '.join(parameters)}"
            )


def item_problem(kind: str, item: Any, reserved_commands: Collection[str]) -> str | None:
    """Why something cannot be a plug-in of that kind, or None."""
    base: Any = KINDS[kind].base
    if kind == "command":
        if not isinstance(item, base):
            return f"{item!r} is not a click command"
        if item.name in reserved_commands:
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
        plugin.model_rebuild()  # resolves annotations that name a class defined later
    except pydantic.errors.PydanticUndefinedAnnotation as error:
        return f"an option of {item.__name__} has the type {error.name}, which is not defined"
    if plugin.positional and plugin.positional not in plugin.model_fields:
        known = suggest(plugin.positional, plugin.model_fields, what="options")
        return f"{item.__name__} has no option {plugin.positional!r}, its `positional`; {known}"
    return None


def _marked(plugin: object) -> list[str]:
    """The names in a plug-in that are marked as implementations of hooks."""
    return [name for name in dir(plugin) if getattr(getattr(plugin, name, None), "gptk_impl", None)]


def unknown_hooks(plugin: object) -> list[str]:
    """A line for each hook that gptk does not know, with the nearest name."""
    hooks = {kind.hook for kind in KINDS.values()}
    return [
        f"there is no hook {name}; {suggest(name, hooks, what='hooks')}"
        for name in _marked(plugin)
        if name not in hooks
    ]


def unmarked_hooks(plugin: object) -> list[str]:
    """A line for each function that has the name of a hook and is not marked as one."""
    marked = _marked(plugin)
    return [
        f"{kind.hook} is not marked as a hook; write @gptk.hookimpl above it"
        for kind in KINDS.values()
        if kind.hook not in marked and callable(getattr(plugin, kind.hook, None))
    ]


def _missing_hook(plugin: object) -> str:
    """What is wrong with a plug-in without hooks, and what to add."""
    if wrong := [*unknown_hooks(plugin), *unmarked_hooks(plugin)]:
        return f"it has no hook of gptk's: {wrong[0]}"
    for name, item in getattr(plugin, "__dict__", {}).items():
        is_defined_here = isinstance(item, type) and item.__module__ == getattr(
            plugin, "__name__", None
        )
        if is_defined_here and issubclass(item, Plugin) and getattr(item, "kind", None) in KINDS:
            hook, returned = KINDS[item.kind].hook, f"[{name}]"
            break
    else:
        hook, returned = "gptk_samplers", "a list of its classes"
    return (
        f"it has no hook, so gptk finds nothing in it; add a function {hook}() that returns "
        f"{returned}, with @gptk.hookimpl above it"
    )
