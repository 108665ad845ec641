"""Building a GPT from a checkpoint, one tensor after the other, so that it takes little memory."""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptk import kernels
from gptk.errors import OptionError, SourceError
from gptk.hooks.weights import Checkpoint
from gptk.model.gpt import GPT
from gptk.model.levels import Levels
from gptk.model.linear import Linear
from gptk.model.packing import PackableModule, Packed
from gptk.model.panels import Panels, can_be_panels
from gptk.model.protocol import CausalModel
from gptk.model.quantization import Quantize, keeps_levels, quantized
from gptk.model.quantization import pack as pack_levels
from gptk.model.segments import Segments
from gptk.model.slow_paths import tell_of_slow_inference
from gptk.weights.empty import empty_gpt
from gptk.weights.failures import explaining_load_failures
from gptk.weights.kept import KeptWeights
from gptk.weights.kinds import embedding_kind, matrix_kind
from gptk.weights.tensors import LazyTensors, Tensors

_log = logging.getLogger(__name__)


def make_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, quantize: Quantize
) -> CausalModel:
    """The model of a checkpoint, for decoding: a GPT as `build_model` makes it, with its weights
    packed, or what the loader makes. Raises what these raise, and OptionError if weights are to be
    rounded that gptk cannot round."""
    if checkpoint.make_model is None:
        return build_model(checkpoint, device, dtype, quantize=quantize, pack=True)
    if quantize not in ("auto", "none"):
        raise OptionError(
            f"quantize {quantize} is for models that gptk has code for, and {checkpoint.source} is "
            "none; take bfloat16"
        )
    with explaining_load_failures(checkpoint.source):
        return checkpoint.make_model(device, dtype)


def build_model(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    quantize: Quantize = "none",
    pack: bool = False,
) -> GPT:
    """The GPT with a checkpoint's weights, in evaluation mode.

    The model is created without memory. Then each tensor is read, converted and put into it before
    the next one is read, so that only one tensor is in memory twice.

    quantize: see gptk.model.quantization.Quantize. With auto, matrices that the checkpoint has as
    Levels keep their codes, and so does the embedding where gptk's kernels run; otherwise Levels
    are dequantized. int8 and int4 round the checkpoint's weights, not those in `dtype`; the
    embedding stays dense, while a head tied to it is rounded. pack: lay the weights out for
    inference, see GPT.pack.

    Raises SourceError naming a tensor that is missing, left over or of the wrong shape, or a file
    that cannot be read; OutOfMemory.
    """
    device, model = torch.device(device), empty_gpt(checkpoint.gpt_config)
    state = _checked_state(checkpoint)
    kept = None
    if pack and quantize == "auto" and device.type == "cpu" and kernels.available():
        kept = KeptWeights(Path(checkpoint.path or checkpoint.source))
    builder = _Builder(model, state, device, dtype, quantize, pack, kept)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    kind = str(dtype).removeprefix("torch.")
    with explaining_load_failures(checkpoint.source, f"{numbers:,} weights in {kind}"):
        builder.fill()
        if pack:
            model.pack()
        if kept is not None:
            kept.keep()
    if pack:
        expanded = quantize == "auto" and bool(builder.expanded)
        tell_of_slow_inference(device, dtype, expanded=expanded)
    return model.eval()


def _checked_state(checkpoint: Checkpoint) -> LazyTensors:
    """A checkpoint's tensors by the names of a GPT, each read when it is looked up.

    Raises SourceError for missing and superfluous ones; those of a wrong shape raise it when read.
    """
    config, source, stored = checkpoint.gpt_config, checkpoint.source, checkpoint.state
    tied = config.tied_head and "head.weight" in stored  # as in a GPT's own state dict
    tensors = Tensors({name: partial(stored.__getitem__, name) for name in stored}, source)
    tensors.drop(["head.weight"] if tied else [])
    state = tensors.assemble(config, {})
    if tied and not torch.equal(stored["head.weight"], stored["embed.weight"]):
        raise SourceError(f"{source}: head.weight is not embed.weight, though the head is tied")
    return state


@dataclass(frozen=True)
class _Builder:
    """Puts tensors into a model that was created without memory."""

    model: GPT
    state: LazyTensors
    device: torch.device
    dtype: torch.dtype
    quantize: Quantize
    pack: bool
    kept: KeptWeights | None
    expanded: list[str] = field(default_factory=list)
    """The matrices that the checkpoint has as Levels, and that auto does not keep here."""

    def fill(self) -> None:
        """Fill the model, layer by layer."""
        model, tied = self.model, self.model.config.tied_head
        for path, layer in model.named_modules():
            for name, _ in list(layer.named_parameters(recurse=False)):
                if layer is not model.head or not tied:
                    self._put(layer, f"{path}.{name}")
            if layer is model.head and tied and model.head.packed is None:
                model.head.weight = model.embed.weight
            if isinstance(layer, Linear) and self.pack:
                layer.pack()

    def _put(self, layer: nn.Module, name: str) -> None:
        """Read the model's tensor `name`, convert it and put it into `layer`, which has it."""
        tensor = self.state[name]
        if isinstance(layer, Linear) and name.endswith(".weight"):
            if (packed := self._packed(name, tensor)) is not None:
                layer.use_packed(packed, self.dtype)
                return
        elif layer is self.model.embed and self._packs_embedding(name, tensor):
            return
        if isinstance(tensor, Levels) and not keeps_levels(
            Segments.of(tensor), self.device, self.dtype
        ):
            self.expanded.append(name)
        if self.pack and self._puts_panels(layer, name, tensor):
            return
        setattr(layer, name.rpartition(".")[2], nn.Parameter(self._converted(tensor)))

    def _puts_panels(self, layer: nn.Module, name: str, tensor: Tensor | Levels) -> bool:
        """Put a matrix of a linear layer in panels, or of an embedding to which the head is tied.
        Whether it is one, and the kernels take it."""
        head = self.model.head
        tied = layer is self.model.embed and self.model.config.tied_head and head.packed is None
        is_matrix = isinstance(layer, Linear) and name.endswith(".weight")
        if not (is_matrix or tied) or not can_be_panels(tensor.shape, self.dtype, self.device):
            return False
        assert isinstance(layer, PackableModule)
        panels = Panels(tensor, self.dtype)
        layer.use_packed(panels, self.dtype)
        if tied:
            head.use_packed(panels, self.dtype)
        return True

    def _packs_embedding(self, name: str, tensor: Tensor | Levels) -> bool:
        """Put the embedding into the model if it stays quantized, and a quantized head that is tied
        to it. Whether the embedding is done."""
        model, keep = self.model, embedding_kind(*self._asked(tensor)) is not None
        if not (model.config.tied_head or keep) or (packed := self._packed(name, tensor)) is None:
            return False
        if model.config.tied_head:
            model.head.use_packed(packed, self.dtype)
        if keep:
            model.embed.use_packed(packed, self.dtype)
        return keep

    def _packed(self, name: str, weight: Tensor | Levels) -> Packed | None:
        """The quantized matrix, or None if it is to be dense."""
        if matrix_kind(*self._asked(weight)) is None:
            return None
        if isinstance(weight, Levels) and self.quantize == "auto":
            return pack_levels(weight) if self.kept is None else self.kept.pack(name, weight)
        weight = weight.dense() if isinstance(weight, Levels) else weight
        assert self.quantize == "int8" or self.quantize == "int4"
        return quantized(weight.to(self.device), self.quantize)

    def _asked(
        self, weight: Tensor | Levels
    ) -> tuple[int, Segments | None, Quantize, torch.device, torch.dtype]:
        """What `matrix_kind` asks of a matrix."""
        stored = Segments.of(weight) if isinstance(weight, Levels) else None
        return weight.shape[1], stored, self.quantize, self.device, self.dtype

    def _converted(self, weight: Any) -> Tensor:
        """The tensor in the model's dtype, on its device."""
        weight = weight.dense(self.dtype) if isinstance(weight, Levels) else weight
        converted: Tensor = weight.to(self.device, self.dtype)
        return converted.contiguous()  # a file may have a tensor with any strides


def log_loading(checkpoint: Checkpoint, model: CausalModel, seconds: float) -> None:
    """What was loaded from where, as information."""
    if not _log.isEnabledFor(logging.INFO):
        return
    notes = "".join(f", {key} {value}" for key, value in (checkpoint.notes or {}).items())
    _log.info("loaded %s%s, in %.1f s", checkpoint.source, notes, seconds)
    dtype = str(model.dtype).removeprefix("torch.")
    if not isinstance(model, GPT):
        _log.info("on %s, %s, by %s", model.device, dtype, type(model).__name__)
        return
    sizes = model.bytes_by_kind().items()
    weights = ", ".join(f"{size / 2**20:,.1f} MiB {kind}" for kind, size in sorted(sizes))
    by = "PyTorch" if model.device.type != "cpu" or kernels.why_not() else "gptk and PyTorch"
    _log.info("on %s, %s, weights %s, kernels of %s", model.device, dtype, weights, by)
