"""Checks of a plug-in module, its hooks, and what these return."""

import inspect
import re
from collections.abc import Collection
from typing import Any

import pydantic

from gptk.errors import PluginError, shown, suggest
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
            return f"{shown(item)} is not a click command"
        if item.name in reserved_commands:
            return f"gptk has a command {item.name} of its own"
        return None
    return class_problem(kind, item)


def class_problem(kind: str, item: Any) -> str | None:
    """Why something cannot be the class of a plug-in of that kind, or None."""
    base: Any = KINDS[kind].base
    if isinstance(item, base):
        made = type(item).__name__
        return f"it returned an instance of {made}; return the class itself, [{made}]"
    if not (isinstance(item, type) and issubclass(item, base)):
        return f"{shown(item)} is not a subclass of gptk.{base.__name__}{_looks_like(item)}"
    name = item.__dict__.get("name")
    if not isinstance(name, str):
        better = _hyphened(item.__name__)
        return f"{item.__name__} has no name; give it a class attribute, `name = {better!r}`"
    if problem := name_problem(name):
        return f"{item.__name__} has the name {name!r}; {problem}"
    try:
        plugin: type[Plugin] = item
        plugin.model_rebuild()  # resolves annotations that name a class defined later
    except pydantic.errors.PydanticUndefinedAnnotation as error:
        return f"an option of {item.__name__} has the type {error.name}, which is not defined"
    if plugin.positional and plugin.positional not in plugin.model_fields:
        known = suggest(plugin.positional, plugin.model_fields, what="options")
        return f"{item.__name__} has no option {plugin.positional!r}, its `positional`; {known}"
    return None


def name_problem(name: str) -> str | None:
    """Why a plug-in cannot have that name, with one that it can have, or None.

    >>> name_problem("my_sampler")
    "a name has letters, digits, dots and hyphens: 'my-sampler'"
    """
    if NAME.fullmatch(name) and "_" not in name and name[-1].isalnum():
        return None
    form = "a name has letters, digits, dots and hyphens"
    better = _hyphened(name)
    return f"{form}: {better!r}" if better else f"{form}, and begins with a letter or digit"


def _hyphened(name: str) -> str:
    """The nearest name that a plug-in can have: `my-sampler` for `my_sampler` and `MySampler`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name)
    return re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-.").lower()


def misgiven(kind: str, given: object, base: type) -> str:
    """What to say of a plug-in that is neither a spec string nor an instance of `base`."""
    if isinstance(given, type) and issubclass(given, base):
        made = given.__name__
        return f"{made} is a class; {_article(kind)} {kind} is an instance, {made}()"
    form = f"{_article(kind)} {kind} is a spec string or a {base.__name__}"
    if isinstance(given, Plugin):
        return f"{form}, and {given.title()} is {_article(given.kind)} {given.kind}"
    return f"{form}, not {shown(given)}{_looks_like(given)}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _looks_like(item: Any) -> str:
    """What else something seems to be, for messages."""
    cls = item if isinstance(item, type) else type(item)
    if any(base.__module__.startswith("transformers.") for base in cls.__mro__):
        return "; gptk.adapters.transformers.from_transformers takes transformers' processors"
    return ""


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
