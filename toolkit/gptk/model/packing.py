"""Matrices of weights in the layout of a kernel, in the place of ordinary parameters."""

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from gptk.model.attributes import tell_of_a_change


class Packed(Protocol):
    """A matrix of weights, (outputs, inputs), in the layout of a kernel."""

    kind: str
    """The precision: int8, int4, bfloat16 or float32."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weights, plus the bias, in x's dtype, without gradients. x: (…, inputs)."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights as an ordinary matrix, (outputs, inputs); dequantized if need be."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """The bytes that the weights take in memory."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        raise NotImplementedError


class PackableModule(nn.Module):
    """A module whose matrix `weight` may be packed."""

    weight: Tensor
    packed: Packed | None = None
    """The weights in another layout. Then there is no `weight`, until `unpack`, or until somebody
    writes one."""
    _packed_dtype: torch.dtype
    _tied: "tuple[PackableModule, ...]" = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `weight`; if it is packed, the one that it gets when it is unpacked."""
        return self.weight.dtype if self.in_use is None else self._packed_dtype

    @property
    def device(self) -> torch.device:
        packed = self.in_use
        return self.weight.device if packed is None else packed.device

    def tie_to(self, other: "PackableModule") -> None:
        """Both have the same packed weights; if one is unpacked by who asks for its weight, so is
        the other, and both have the same parameter."""
        self._tied, other._tied = (other,), (self,)  # tuples: not modules of each other

    def use_packed(self, packed: Packed, dtype: torch.dtype) -> None:
        """Replace `weight` by packed weights. dtype: see the property `dtype`."""
        self._parameters.pop("weight", None)
        self.packed, self._packed_dtype = packed, dtype
        tell_of_a_change()

    @property
    def in_use(self) -> Packed | None:
        """`packed`, unless there is a `weight`, too, as in torch.func.functional_call."""
        return None if "weight" in self._parameters else self.packed

    def unpack(self) -> None:
        """Make the weights an ordinary parameter again, with the values that `packed` has."""
        packed, self.packed = self.in_use, None
        tell_of_a_change()
        if packed is not None:
            self.weight = nn.Parameter(packed.dense(self._packed_dtype))

    def __getattr__(self, name: str) -> Any:
        packed = self.__dict__.get("packed") if name == "weight" else None
        if packed is None or packed.kind.startswith("int"):
            return super().__getattr__(name)
        self.unpack()
        for other in self._tied:
            if other.packed is packed:
                other.packed = None
                tell_of_a_change()
                other.weight = self.weight
        return self.weight

    def __delattr__(self, name: str) -> None:
        if name == "weight" and self.in_use is not None:
            self.packed = None
            tell_of_a_change()
        else:
            super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `float`, `cuda` and the like call. Quantized weights take another dtype as it
        is; for another device weights are unpacked."""
        if (packed := self.in_use) is not None:
            like = fn(torch.empty(0, dtype=self._packed_dtype, device=packed.device))
            any_dtype = packed.kind.startswith("int")
            if like.device == packed.device and (any_dtype or like.dtype == self.dtype):
                self._packed_dtype = like.dtype
            else:
                self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (packed := self.in_use) is not None:
            destination[prefix + "weight"] = packed.dense(self._packed_dtype)
