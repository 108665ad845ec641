"""What reads and writes weights: loaders, writers, and the checkpoint that a loader returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gptk.errors import SourceError
from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gptk.model.config import GPTConfig
    from gptk.model.gpt import GPT
    from gptk.model.protocol import CausalModel
    from gptk.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a weight loader found."""

    config: "GPTConfig | None"
    """None if the model is no `gptk.GPT`: then `make_model` makes it."""
    state: Mapping[str, "Tensor"]
    """The tensors by the names of `gptk.GPT`'s parameters; a tied head is not among them, it is
    `embed.weight`. They may be in any precision and memory-mapped; `build_model` takes them
    over without a copy where device and dtype are right. What `Tensors.assemble` returns reads a
    tensor each time it is asked for, so that a model need not be in memory twice. Those of
    `load_stored` may be `gptk.Levels`."""
    tokenizer: "Callable[[], Tokenizer] | None" = None
    """Makes the tokenizer stored with the weights, if there is one; may raise TokenizerError."""
    source: str = ""
    """Where it came from, for messages."""
    notes: Mapping[str, str] | None = None
    """More for `gptk info`: the format, the precision it was stored in."""
    path: Path | None = None
    """The file or folder that was read, if `source` is another name for it. Records of results have
    the hashes of its files."""
    make_model: "Callable[[torch.device, torch.dtype], CausalModel] | None" = None
    """Makes a model that is no `gptk.GPT`, with its weights; may raise GptkError. `state` then has
    the tensors by the names of the file, for `gptk info`."""

    @property
    def gpt_config(self) -> "GPTConfig":
        """Raises SourceError if the model is no `gptk.GPT`."""
        if self.config is None:
            raise SourceError(
                f"{self.source} is not a model that gptk has code for, by its model type; it can "
                "be decoded, and not trained, converted or built"
            )
        return self.config


class WeightLoader(Plugin):
    """Reads weights of one format. Options come from the spec string; `path` is the source."""

    kind: ClassVar[str] = "loader"

    @classmethod
    def matches(cls, source: str) -> bool:
        """Whether `source` is of this format; it must not be read as a whole.

        By default never: such a loader is named by its spec string.
        """
        return False

    @classmethod
    def fetches(cls, source: str) -> bool:
        """Whether it may fetch `source`, which is no path here, no loader's name or spec string,
        and is matched by no loader; for example, whether it is the id of a model on a hub.

        By default never.
        """
        return False

    @classmethod
    def from_source(cls, source: str) -> "WeightLoader":
        """The loader for a source that it `matches` or `fetches`; by default, its option `path`."""
        options: dict[str, Any] = {"path": source}  # a field that the subclass declares
        return cls(**options)

    @classmethod
    def default_source(cls) -> str | None:
        """The source of an installed model, for when the user names none; None if there is none."""
        return None

    def load(self) -> Checkpoint:
        """Read the configuration and all tensors. Raises SourceError."""
        raise NotImplementedError(f"{type(self).__name__} does not define load()")

    def load_stored(self) -> Checkpoint:
        """As `load`, with matrices that are stored quantized as gptk.Levels where it can.

        By default it is `load`.
        """
        return self.load()


class WeightWriter(Plugin):
    """Writes a model in one format, a directory, for `gptk convert --to NAME`."""

    kind: ClassVar[str] = "writer"

    def write(self, path: Path, model: "GPT", tokenizer: "Tokenizer | None") -> None:
        """Write into the empty directory `path`, which is moved to its place afterwards.

        Raises SourceError for a model, or TokenizerError for a tokenizer, that the format cannot
        hold.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define write()")
