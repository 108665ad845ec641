"""Tensors that lie on a GPU, as far as PyTorch's operations can tell: their memory is the CPU's.

Operations between such a tensor and one on the CPU raise an error, as PyTorch's do on CUDA. So code
that mixes devices is found without a GPU. The device is named `meta`, since PyTorch refuses to
handle a tensor on CUDA without the drivers; a model with `on_gpu` weights decodes as on CUDA.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")


class OnGPU(Tensor):
    """A tensor on the device. inner: the same on the CPU."""

    inner: Tensor  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def new_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        return OnGPU(self.inner.new_tensor(*args, **kwargs))

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_without_lists(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_without_lists(key), value)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on a GPU cannot be converted to a numpy array")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class Devices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it new tensors of this thread can be on the device, too."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def on_gpu(model: nn.Module) -> nn.Module:
    """The model with its weights on the device."""
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                moved = nn.Parameter(OnGPU(weight.detach()), requires_grad=False)
                module._parameters[name] = weights.setdefault(id(weight), moved)
    return model


def tensor_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor or torch.as_tensor, which know the device; they bypass modes."""

    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device) != DEVICE:
            return function(*args, device=device, **kwargs)
        return OnGPU(function(*map(_inner, args), **kwargs))

    return make


def _run(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU."""
    name = str(function).split(".")[1]
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    moved = {id(each.inner): each for each in tensors if isinstance(each, OnGPU)}
    is_moved = bool(moved)
    if (device := kwargs.get("device")) is not None:
        is_moved = torch.device(device) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    if name == "copy_":
        is_moved = isinstance(args[0], OnGPU)
    elif moved and name != "_to_copy":
        # As on CUDA, single numbers and indices may be on the CPU.
        indexing = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        checked = tensors[:1] if indexing else [each for each in tensors if each.dim()]
        if not all(isinstance(each, OnGPU) for each in checked):
            raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not is_moved or name == "_local_scalar_dense":
        return result
    return tree_map(lambda each: moved.get(id(each), _outer(each)), result)


def _without_lists(key: Any) -> Any:
    """An index with tensors on the CPU instead of lists, whose numbers would be lost on `meta`."""
    if isinstance(key, tuple):
        return tuple(map(_without_lists, key))
    return torch.tensor(key) if isinstance(key, list) else key


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGPU) else value


def _outer(value: Any) -> Any:
    return OnGPU(value) if isinstance(value, Tensor) and not isinstance(value, OnGPU) else value
