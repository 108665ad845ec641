"""The base class of plug-ins: a name, and typed options."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pydantic_core

from gptk.errors import (
    OptionError,
    PluginError,
)
from gptk.options import Options
from gptk.spec import format_spec
from gptk.system.read_files import ReadFile


class Plugin(Options):
    """The base class of everything that hooks return, except commands: a name, and options.

    `gptk plugins show NAME` and the parsing of spec strings follow from the declared options.
    `positional` names the option that a spec string may give without its name: with
    `positional = "width"`, `beam:4` is `beam:width=4`.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    example: ClassVar[str] = ""
    """Options worth showing, such as `width=4`; `gptk plugins show` makes a command of it."""
    other_names: ClassVar[Mapping[str, str]] = {}
    """How other programs call options of this plug-in: `{"num_beams": "width"}`. A name that stands
    for the plug-in itself has the option "": `{"do_sample": ""}`."""

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        super().__pydantic_init_subclass__(**settings)
        if problem := cls._class_problem():
            raise PluginError(problem)

    @classmethod
    def _class_problem(cls) -> str | None:
        """What is wrong with the class itself, or None; a class with a problem is refused."""
        if made := {"__init__", "__new__"} & vars(cls).keys():
            return (
                f"{cls.__name__} defines {min(made)}(), but gptk makes a plug-in of its options "
                f"alone; declare options as fields, `strength: float = 1.0`{cls._where_state()}"
            )
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                return f"{cls.__name__}.{name}() is async, and gptk does not await it; write `def`"
        for name in cls.model_fields:
            if owner := _owner_of(name, cls.__mro__[1:]):
                return f"{cls.__name__} declares `{name}` as an option, which {owner} has for " + (
                    f"itself; write `{name} = …` without a type" if name in _PLAIN else "itself"
                )
        return None

    @classmethod
    def _where_state(cls) -> str:
        """For messages: where state belongs, if a class of this kind has a place for it."""
        if not hasattr(cls, "start"):
            return ""
        return ", and keep what a run must remember in an object that start() returns"

    @classmethod
    def title(cls) -> str:
        return f"{cls.kind} {cls.name}"

    def __setattr__(self, name: str, value: Any) -> None:
        raise PluginError(
            f"{self.title()} cannot be changed (by setting {name}): it may serve several calls at "
            f"once. Options are given when it is made{self._where_state()}"
        )

    def files_read(self) -> Sequence[ReadFile]:
        """The files on whose content its results depend; records have their names and SHA-256.

        Asked when a run has ended. By default none. A plug-in that reads a file returns
        `[gptk.plugins.ReadFile.of(path)]`, one that loads a model the model's `files_read()`.
        """
        return ()

    @property
    def spec(self) -> str:
        """The spec string that makes an equal plug-in; options at their default are left out.

        Raises OptionError if an option is an object that cannot be written as text.
        """
        try:
            options = self.model_dump(mode="json", exclude_defaults=True)
        except pydantic_core.PydanticSerializationError:
            raise OptionError(
                f"{self.title()} was made with an object and has no spec string"
            ) from None
        return format_spec(self.name, options)


_PLAIN = ("name", "kind", "example", "random", "competing", "logits")
"""Attributes of a class that are no options."""


def _owner_of(name: str, bases: tuple[type, ...]) -> str | None:
    """The class of gptk's among the bases that has an attribute of that name which is no option."""
    for base in bases:
        if not issubclass(base, Options):
            break
        if name in base.model_fields:
            break
        if name in vars(base) or name in base.__class_vars__:
            return base.__name__
    return None
