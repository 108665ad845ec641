"""Matrices of weights in the layout of a kernel, in the place of ordinary parameters."""

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class Packed(Protocol):
    """A matrix of weights, (outputs, inputs), in the layout of a kernel."""

    kind: str
    """The precision: int8, int4 or bfloat16."""

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
    """The weights in another layout. Then there is no `weight`, until `unpack`."""
    _packed_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `weight`; if it is packed, the one that it gets when it is unpacked."""
        return self.weight.dtype if self.packed is None else self._packed_dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.packed is None else self.packed.device

    def use_packed(self, packed: Packed, dtype: torch.dtype) -> None:
        """Replace `weight` by packed weights. dtype: see the property `dtype`."""
        if self.packed is None:
            del self.weight
        self.packed, self._packed_dtype = packed, dtype

    def unpack(self) -> None:
        """Make the weights an ordinary parameter again, with the values that `packed` has."""
        if self.packed is not None:
            self.weight = nn.Parameter(self.packed.dense(self._packed_dtype))
            self.packed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `float`, `cuda` and the like call. Quantized weights take another dtype as it
        is; for another device weights are unpacked."""
        if self.packed is not None:
            like = fn(torch.empty(0, dtype=self._packed_dtype, device=self.packed.device))
            any_dtype = self.packed.kind.startswith("int")
            if like.device == self.packed.device and (any_dtype or like.dtype == self.dtype):
                self._packed_dtype = like.dtype
            else:
                self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.packed.dense(self._packed_dtype)
