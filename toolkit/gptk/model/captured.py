"""What recorded operations hold of their model: whether they may, and whether they still do.

They hold tensors, and repeat what layers did when they were recorded. So it must be noticed when a
weight is replaced, moved or converted, and when a layer is exchanged, quantized or gets a hook.
Values that are written into the same tensor need no notice: they are read.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from gptk.model.attributes import are_found_directly, changes
from gptk.model.gpt import GPT, Experts
from gptk.model.packing import PackableModule

Weight = tuple[list[dict[str, Any]], str, Tensor]
"""A weight: the dictionaries of attributes that hold it, its name in them, and the tensor."""

_address, _dtype = Tensor.data_ptr, operator.attrgetter("dtype")


class Snapshot:
    """The layers and weights of a model at a time. The model must be `why_not_capturable` None.

    It does not keep the model alive, but its layers.
    """

    def __init__(self, model: GPT) -> None:
        self._changes = changes()
        modules = list(model.modules())
        self._tells = all(map(are_found_directly, modules))
        """Whether `changes` grows if a layer or weight is replaced."""
        held: list[tuple[dict[str, Any], str, object]] = []
        for module in modules:
            held += [(module._modules, name, child) for name, child in module._modules.items()]
            if isinstance(module, PackableModule):
                held.append((module.__dict__, "packed", module.__dict__.get("packed")))
        weights = weights_of(model)
        for holders, name, tensor in weights:
            held += [(holder, name, tensor) for holder in holders]
        self._holders, self._names, self._held = zip(*held, strict=True)
        # Without the model's own: no pass calls its `forward`, and they may hold the model.
        self._attributes = [module.__dict__ for module in modules if module is not model]
        self._hooks = [hooks for module in modules for hooks in _hooks(module)]
        self.tensors = [tensor for _, _, tensor in weights]
        self._addresses = list(map(_address, self.tensors))
        self._dtypes = list(map(_dtype, self.tensors))

    def is_current(self) -> bool:
        """Whether the model has the same layers without hooks, and the same weights in memory.

        Takes some 50 µs for a model of 30 layers, or 100 µs if its layers tell of no changes, as
        they do after `GPT.pack`. All is compared by functions in C.
        """
        if any(self._hooks) or not self.is_in_place():
            return False
        if any("forward" in attributes for attributes in self._attributes):
            return False
        if self._tells and self._changes == changes():
            return True
        before = changes()
        if not all(map(operator.is_, map(dict.get, self._holders, self._names), self._held)):
            return False
        self._changes = before  # they were of other models
        return True

    def is_in_place(self) -> bool:
        """Whether the tensors of the snapshot were neither moved nor converted."""
        return (
            list(map(_address, self.tensors)) == self._addresses
            and list(map(_dtype, self.tensors)) == self._dtypes
        )


def why_not_capturable(model: GPT) -> str | None:
    """Why a model cannot be recorded: something in it that would not be repeated. Or None."""
    for name, module in model.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(("gptk.model.", "torch.nn.modules.")):
            return f"{name or 'the model'} is a {kind.__qualname__} of {kind.__module__}"
        if isinstance(module, Experts):
            return f"{name} gives tokens to experts by their numbers"
        if any(_hooks(module)):
            return f"{name or 'the model'} has hooks"
        if "forward" in module.__dict__:
            return f"the method forward of {name or 'the model'} is replaced"
    return None


def weights_of(model: GPT) -> list[Weight]:
    """All weights of a model: parameters, and the tensors of packed layers."""
    found: list[Weight] = []
    packed: list[object] = []
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                # `GPT.pack` has put them into the module's attributes, too.
                holders = [module._parameters, module.__dict__]
                found.append(([holder for holder in holders if name in holder], name, value))
        if isinstance(module, PackableModule) and module.packed is not None:
            packed.append(module.packed)
    # A tied head and the embedding may have the same packed matrix.
    for matrix in {id(matrix): matrix for matrix in packed}.values():
        for attributes in _attributes(matrix):
            tensors = [item for item in attributes.items() if isinstance(item[1], Tensor)]
            found += [weight for item in tensors for weight in _stored(attributes, *item)]
    return found


@contextlib.contextmanager
def weights_replaced(model: GPT, weights: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the model computes with these tensors instead of its weights."""
    originals = weights_of(model)
    try:
        for (holders, name, _), weight in zip(originals, weights, strict=True):
            for holder in holders:
                holder[name] = weight
        yield
    finally:
        for holders, name, weight in originals:
            for holder in holders:
                holder[name] = weight


def _stored(holder: dict[str, Any], name: str, tensor: Tensor) -> Iterator[Weight]:
    """A tensor, or those that it consists of, as torchao's do."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield [holder], name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield [vars(tensor)], part, getattr(tensor, part)


def _attributes(packed: object) -> Iterator[dict[str, Any]]:
    """The attributes of packed weights, and of packed weights that these are made of."""
    yield vars(packed)
    for value in vars(packed).values():
        if type(value).__module__ == type(packed).__module__:
            yield from _attributes(value)


def _hooks(module: nn.Module) -> tuple[dict[Any, Any], dict[Any, Any]]:
    return module._forward_hooks, module._forward_pre_hooks
