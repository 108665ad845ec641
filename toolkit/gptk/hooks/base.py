"""The base class of plug-ins: a name, and typed options."""

from typing import Any, ClassVar

import pydantic_core

from gptk.errors import (
    OptionError,
    PluginError,
)
from gptk.options import Options
from gptk.spec import format_spec


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

    @classmethod
    def title(cls) -> str:
        return f"{cls.kind} {cls.name}"

    def __setattr__(self, name: str, value: Any) -> None:
        raise PluginError(
            f"{self.kind} {self.name} cannot be changed: it may serve several calls at once. A "
            "processor keeps state in the object that start() returns"
        )

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
