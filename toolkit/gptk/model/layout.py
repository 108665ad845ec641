"""How the weights of a model lie in memory: as ordinary parameters, packed, or quantized."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from gptk.model.attributes import find_by_getattr, find_directly
from gptk.model.config import GPTConfig
from gptk.model.embedding import Embedding
from gptk.model.linear import Linear
from gptk.model.packing import PackableModule
from gptk.model.panels import Panels
from gptk.model.rounding import Precision


class PackableModel(nn.Module):
    """A model with a token embedding and a head, whose matrices may be packed or quantized."""

    config: GPTConfig
    embed: Embedding
    head: Linear

    def pack(self) -> Self:
        """Lay weights out for fast decoding, until `unpack` or `train`. Returns the model."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
            find_directly(module)
        if self.config.tied_head and isinstance(self.head.packed, Panels):
            self.embed.use_packed(self.head.packed, self.head.dtype)
            self.embed.tie_to(self.head)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "blocks" in state:  # a copy of a packed model
            self.pack()

    def quantize(self, precision: Precision) -> Self:
        """Round the weights of the linear layers, the head's too, to int8 or int4.

        Embeddings, norms, biases and layers whose inputs are no multiple of 32 stay as they are,
        and so do layers of that precision. On a CPU or, by torchao, on CUDA. Only one layer's
        weights at a time are in memory twice. `unpack` and `train` make ordinary parameters of the
        rounded weights. Returns the model. See gptk.model.quantization.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantize(precision)
        return self

    def bytes_by_kind(self) -> dict[str, int]:
        """The bytes of all weights by their precision: float32, bfloat16, int8, int4."""
        sizes: dict[str, int] = {}
        for parameter in self.parameters():
            kind = str(parameter.dtype).removeprefix("torch.")
            sizes[kind] = sizes.get(kind, 0) + parameter.nbytes
        modules = [module for module in self.modules() if isinstance(module, PackableModule)]
        # A tied head and the embedding may have the same packed matrix.
        for packed in {id(m.packed): m.packed for m in modules if m.packed is not None}.values():
            sizes[packed.kind] = sizes.get(packed.kind, 0) + packed.nbytes
        return sizes

    def unpack(self) -> None:
        """Undo `pack`; make parameters of weights that `quantize` rounded."""
        for module in self.modules():
            find_by_getattr(module)
            if isinstance(module, PackableModule):
                module.unpack()
        self.tie()

    def train(self, mode: bool = True) -> Self:
        """Training mode, or evaluation mode. Only unpacked weights can be trained."""
        if mode:
            self.unpack()
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in nn.Module. Weights that are packed or quantized become ordinary parameters."""
        for module in self.modules():
            if isinstance(module, PackableModule):
                module.unpack()
        self.tie()
        return super().load_state_dict(state_dict, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of activations, and of weights that are not quantized."""
        return self.embed.dtype

    def tie(self) -> None:
        """Let the head share the embedding's matrix, if it is tied and not packed."""
        if self.config.tied_head and self.head.packed is None:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()  # for another device, embedding and head have been unpacked each for itself
        return self
