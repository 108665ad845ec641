"""A GPT with a checkpoint's weights, each read, converted and put in place before the next."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gptk import kernels
from gptk.errors import SourceError
from gptk.hooks.weights import Checkpoint
from gptk.model.gpt import GPT
from gptk.model.levels import Levels, Precision
from gptk.model.linear import Linear
from gptk.model.quantization import Packed, quantized
from gptk.model.quantization import pack as pack_levels
from gptk.system.memory import new_bytes
from gptk.weights.empty import empty_gpt
from gptk.weights.tensors import LazyTensors, Tensors


def build_model(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    quantize: Precision | Literal["stored"] | None = None,
    pack: bool = False,
) -> GPT:
    """The GPT with a checkpoint's weights, in evaluation mode.

    The model is made without memory, and each tensor read, converted and put in its place before
    the next, so that only the tensor at work is in memory twice. quantize: the linear layers'
    precision, see gptk.model.quantization; rounded from the weights as they are stored, not as
    `dtype` has them. With `stored` matrices that came as Levels stay so; else Levels are
    dequantized. An embedding always is, and a tied head beside it may stay quantized. pack: lay
    the weights out for inference, see GPT.pack.
    Raises SourceError naming a tensor that is missing, left over or of the wrong shape.
    """
    model = empty_gpt(checkpoint.config)
    # gptk's kernels read weights in huge pages a quarter faster. In float32 to get so many pages
    # may take longer than a text of a hundred tokens gains.
    huge_pages = (
        pack
        and dtype == torch.bfloat16
        and torch.device(device).type == "cpu"
        and kernels.available()
    )
    state = _checked_state(checkpoint)
    _Builder(model, state, torch.device(device), dtype, quantize, huge_pages).fill(pack=pack)
    if pack:
        model.pack()
    return model.eval()


def _checked_state(checkpoint: Checkpoint) -> LazyTensors:
    """The tensors of a GPT, by name, each read when it is asked for."""
    config, source, given = checkpoint.config, checkpoint.source, checkpoint.state
    tied = config.tied_head and "head.weight" in given  # a GPT's state dict has it twice
    tensors = Tensors({name: partial(given.__getitem__, name) for name in given}, source)
    tensors.drop(["head.weight"] if tied else [])
    state = tensors.assemble(config, {})
    if tied and not torch.equal(given["head.weight"], given["embed.weight"]):
        raise SourceError(f"{source}: head.weight is not embed.weight, though the head is tied")
    return state


@dataclass(frozen=True)
class _Builder:
    """Puts tensors into the empty places of a model."""

    model: GPT
    state: LazyTensors
    device: torch.device
    dtype: torch.dtype
    quantize: Precision | Literal["stored"] | None
    huge_pages: bool

    def fill(self, *, pack: bool) -> None:
        model, tied = self.model, self.model.config.tied_head
        for path, layer in model.named_modules():
            for name, _ in list(layer.named_parameters(recurse=False)):
                if layer is not model.head or not tied:
                    self._place(layer, f"{path}.{name}")
            if layer is model.head and tied and model.head.packed is None:
                model.head.weight = model.embed.weight
            if isinstance(layer, Linear) and pack:
                layer.pack()

    def _place(self, layer: nn.Module, name: str) -> None:
        tensor = self.state[name]
        if isinstance(layer, Linear) and name.endswith(".weight"):
            packed = self._packed(tensor)
            if packed is not None:
                layer.take(packed)
                return
        is_tied = name == "embed.weight" and self.model.config.tied_head
        if is_tied and (for_head := self._packed(tensor)) is not None:
            self.model.head.take(for_head)
        setattr(layer, name.rpartition(".")[2], nn.Parameter(self._plain(tensor)))

    def _packed(self, weight: Tensor | Levels) -> Packed | None:
        """A quantized matrix, or None where it is to stay plain."""
        if self.quantize == "stored":
            return pack_levels(weight) if isinstance(weight, Levels) else None
        if self.quantize is None:
            return None
        weight = weight.dense() if isinstance(weight, Levels) else weight
        return quantized(weight.to(self.device), self.quantize)

    def _plain(self, weight: Any) -> Tensor:
        """A tensor in the model's precision, on its device."""
        dtype = self.dtype
        if self.huge_pages and len(weight.shape) == 2:
            out = new_bytes(weight.shape.numel() * dtype.itemsize).view(dtype).view(weight.shape)
            return weight.dense(out=out) if isinstance(weight, Levels) else out.copy_(weight)
        weight = weight.dense(dtype) if isinstance(weight, Levels) else weight
        placed: Tensor = weight.to(self.device, dtype)
        return placed
