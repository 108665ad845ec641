"""Tensors of a checkpoint by name: each must be used exactly once, and is read when needed."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from gptk.errors import SourceError
from gptk.system.memory import is_out_of_memory
from gptk.weights.empty import empty_gpt

if TYPE_CHECKING:
    from gptk.model.config import GPTConfig


class Tensors:
    """The tensors of a file, each to be taken exactly once.

    A loader takes the tensors that it knows and calls `finish`. A missing tensor, and one that was
    not taken, are errors that name it.
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
        """Read a tensor and mark it as used. Raises SourceError if missing or already used."""
        return self._reader(name)()

    def _reader(self, name: str) -> "Callable[[], Any]":
        if name not in self._readers:
            problem = "is used twice" if name in self._names else "is missing"
            raise SourceError(f"{self._source}: the tensor {name} {problem}")
        return self._readers.pop(name)

    def drop(self, names: Iterable[str]) -> None:
        """Mark tensors as used that need not be loaded, such as a stored causal mask."""
        for name in names:
            self._readers.pop(name, None)

    def assemble(
        self,
        config: "GPTConfig",
        names: Mapping[str, str],
        change: "Callable[[str, Any], Any] | None" = None,
    ) -> "LazyTensors":
        """The state dict of a GPT of that configuration, for a Checkpoint, from all tensors.

        names: from gptk's names to the file's. `{i}` is the layer, `{e}` the expert;
        `blocks.{i}.mlp.down` stands for
        its weight and its bias; several names of the file, separated by spaces, are concatenated,
        as queries, keys and values for the fused `attn.qkv`. A name that is not in `names` is the
        same in the file. change: takes the file's name and tensor, and returns the tensor in gptk's
        layout. Tensors may be gptk.Levels, too.

        Tensors are read, changed and concatenated when they are looked up. Raises SourceError
        naming a tensor that is missing or left over; one of the wrong shape raises it when read.
        """
        if config.n_layers > len(self._names):
            raise SourceError(
                f"{self._source}: the configuration has {config.n_layers} layers, the file only "
                f"{len(self._names)} tensors"
            )
        readers: dict[str, Callable[[], Any]] = {}
        for name, shape in _parameters(config):
            parts = {theirs: self._reader(theirs) for theirs in _their_names(name, names)}
            readers[name] = partial(_assembled, name, shape, parts, change, self._source)
        self.finish()
        return LazyTensors(readers)

    def finish(self) -> None:
        """Raises SourceError if a tensor was not used."""
        if self._readers:
            left = sorted(self._readers)
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise SourceError(
                f"{self._source}: nothing in the model uses the tensors {', '.join(left[:5])}{more}"
            )


def _parameters(config: "GPTConfig") -> "Iterator[tuple[str, tuple[int, ...]]]":
    """Names and shapes of a GPT's parameters, layer by layer; a tied head is the embedding.

    Only one block is made, since all are alike: a file may name more layers than can be made.
    """
    one_layer = empty_gpt(dataclasses.replace(config, n_layers=1))
    shapes = {name: tuple(x.shape) for name, x in one_layer.named_parameters()}
    of_block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    for name, shape in shapes.items():
        if name == next(iter(of_block)):
            for layer in range(config.n_layers):
                yield from ((x.replace("0", str(layer), 1), s) for x, s in of_block.items())
        if name not in of_block:
            yield name, shape


class LazyTensors(MutableMapping[str, Any]):
    """Tensors by name, each read whenever it is looked up."""

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
    """The tensor `name` of a GPT from those of a file. Raises SourceError for a wrong shape."""
    read = {theirs: _weight(reader(), theirs, source) for theirs, reader in parts.items()}
    found = " + ".join(str(tuple(part.shape)) for part in read.values())
    try:
        if change is not None:
            read = {theirs: change(theirs, part) for theirs, part in read.items()}
        tensor = next(iter(read.values())) if len(read) == 1 else _concatenated([*read.values()])
        fits = tuple(tensor.shape) == shape
    except (RuntimeError, IndexError) as error:  # what PyTorch raises for shapes that don't fit
        if is_out_of_memory(error):
            raise
        fits = False
    if not fits:
        raise SourceError(
            f"{source}: {' + '.join(parts)} of shape {found} does not make {name} "
            f"of shape {shape}, which the configuration asks for"
        )
    return tensor


def _weight(tensor: Any, name: str, source: str) -> Any:
    """The tensor, without gradient. Raises SourceError unless it holds floating-point numbers."""
    import torch

    from gptk.model.levels import Levels

    if isinstance(tensor, Levels):
        return tensor
    what = f"{source}: the tensor {name}"
    if not isinstance(tensor, torch.Tensor):
        raise SourceError(f"{what} is a {type(tensor).__name__}, not a tensor of PyTorch's")
    stored = str(tensor.dtype).removeprefix("torch.")
    if stored not in _FLOATS:
        raise SourceError(f"{what} is stored as {stored}; weights are {', '.join(_FLOATS)}")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_nested:
        raise SourceError(f"{what} has no numbers in memory one after the other; save it dense")
    return tensor.detach()


_FLOATS = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")


def _concatenated(parts: Sequence[Any]) -> Any:
    """Concatenate by outputs: Levels if all are; else they are dequantized."""
    import torch

    from gptk.model.levels import Levels

    if all(isinstance(part, Levels) for part in parts):
        return Levels.stack(parts)
    return torch.cat([part.dense() if isinstance(part, Levels) else part for part in parts])


def _their_names(ours: str, names: Mapping[str, str]) -> list[str]:
    """The file's names of the tensors that make up a GPT's. For `names` see `assemble`."""
    numbers = dict(zip(("{i}", "{e}"), re.findall(r"\.(\d+)(?=\.)", ours), strict=False))
    pattern = ours
    for place, number in numbers.items():
        pattern = pattern.replace(f".{number}.", f".{place}.", 1)
    module, _, parameter = pattern.rpartition(".")
    if pattern in names:
        theirs = names[pattern].split()
    elif module in names:
        theirs = [f"{name}.{parameter}" for name in names[module].split()]
    else:
        theirs = [pattern]
    for place, number in numbers.items():
        theirs = [name.replace(place, number) for name in theirs]
    return theirs
