"""What a tokenizer loader is: from a name or a file to a Tokenizer."""

from typing import ClassVar

from gptk.hooks.base import Plugin
from gptk.text.tokenizer import Tokenizer


class TokenizerLoader(Plugin):
    """Makes a Tokenizer from a name or a file."""

    kind: ClassVar[str] = "tokenizer"

    @classmethod
    def matches(cls, source: str) -> bool:
        """Whether it makes the tokenizer for `source`, a name or a path that is no spec string."""
        return source == cls.name

    @classmethod
    def from_source(cls, source: str) -> "TokenizerLoader":
        """The loader for a source that `matches`."""
        return cls()

    @classmethod
    def default_source(cls) -> str | None:
        """The name of an installed model that has this tokenizer, by which `matches` finds it.

        `WeightLoader.default_source` of the model's loader gives the same. By default None.
        """
        return None

    def load(self) -> Tokenizer:
        """Read or make the tokenizer. Raises TokenizerError."""
        raise NotImplementedError(f"{type(self).__name__} does not define load()")
