"""What gptk has to know of a model of transformers' before it runs it, found by running it.

First the model reads a few tokens with transformers' own attention: that shows the layers, the
sizes of their keys and values, and where the head begins. Then it reads them with gptk's, in
several passes and beside another row, and the states have to be the same.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptk.errors import IncompatibleError
from gptk.model.attention import Attending
from gptk.model.protocol import CausalModel
from gptk.model.transformers_attention import NAME, WATCH, Pass, register


def check_class(module: nn.Module) -> None:
    """Raises IncompatibleError, with the reason, for a model whose class or configuration says that
    gptk cannot run it."""
    if not isinstance(module, PreTrainedModel):
        raise IncompatibleError(f"{type(module).__name__} is no model of transformers'")
    if reason := why_not(module):
        raise _refusal(module, reason)


def why_not(module: PreTrainedModel) -> str | None:
    """Why gptk cannot run a model, as its class and configuration say."""
    config = module.config.get_text_config(decoder=True)
    if module.config.is_encoder_decoder:
        return "it has an encoder, and gptk decodes from tokens alone"
    if not module.can_generate():
        return "it is no causal language model"
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}; {_ALONE}"
    if module._is_stateful:
        return f"it remembers more than keys and values; {_ALONE}"
    if not module._supports_attention_backend:
        return "its class in transformers computes attention itself, so that gptk's cannot be used"
    return None


def window_of(module: nn.Module) -> int:
    """The most tokens of a row for which what the model computes does not depend on other rows.

    Beyond a length, rotary positions that are dynamic or longrope are those of the longest row of a
    pass. Raises IncompatibleError if the configuration does not say how long rows may be.
    """
    config: Any = module.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    window = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int) or window < 1:
        raise _refusal(module, "its configuration has no max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    for rule in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if rule.get("rope_type") in ("dynamic", "longrope"):
            window = min(window, rule.get("original_max_position_embeddings") or window)
    return window


@dataclass
class _Layer:
    """What a layer's attention is like."""

    attention: nn.Module
    heads: int
    kv_heads: int
    head_dim: int


class Probe:
    """What is found by running a model. Raises IncompatibleError if gptk cannot run it."""

    def __init__(self, module: Any) -> None:
        register()
        self._module = module
        self._seen: list[_Layer] = []
        self._cached = 0
        vocab_size = module.config.get_text_config(decoder=True).vocab_size
        self._rows = [[number % vocab_size for number in row] for row in _ROWS]
        with self._explaining(), torch.inference_mode():
            module.set_attn_implementation(NAME)
            self.base = self._find_base()
            self._want = [self._own_states(row) for row in self._rows]
        if not self._seen or len({layer.heads for layer in self._seen}) > 1:
            raise _refusal(module, "its layers have unequal numbers of heads")
        self.heads = self._seen[0].heads
        self.width = self._want[0].shape[-1]
        self.layers = self._find_layers()

    def sizes(self) -> tuple[int, int, int]:
        """Layers with keys and values, and the most heads and the largest ones of a layer."""
        kv_heads = max(layer.kv_heads for layer in self._seen)
        return self._cached, kv_heads, max(layer.head_dim for layer in self._seen)

    def compare(self, model: CausalModel) -> None:
        """Raises IncompatibleError unless the model's states are those of transformers' attention.

        In 16 bits, where a little may become much (as in a choice of experts), it only has to run.
        """
        with self._explaining(), torch.inference_mode():
            cache = model.new_cache(len(self._rows), 8)
            half = [len(row) // 2 for row in self._rows]
            layers = range(len(self.layers) + 1) if self.layers else ()
            got: list[Tensor] = []
            for part in (
                [row[:end] for row, end in zip(self._rows, half, strict=True)],
                [row[end:] for row, end in zip(self._rows, half, strict=True)],
            ):
                time = max(map(len, part))
                padded = [row + [0] * (time - len(row)) for row in part]
                ids = torch.tensor(padded, device=model.device)
                got.append(model.states(ids, cache, list(map(len, part)), layers)[:, :, 0])
            logits = model.logits(self._want[0])
        if model.dtype != torch.float32:
            return
        for number, (want, end) in enumerate(zip(self._want, half, strict=True)):
            rest = len(want) - end
            states = torch.cat((got[0][number, :end], got[1][number, :rest]))
            if not _are_close(states, want):
                raise _refusal(self._module, "what it computes with gptk's attention differs")
        if not _are_close(logits, self._logits):
            raise _refusal(self._module, "its head reads more than the last states")

    def _own_states(self, row: Sequence[int]) -> Tensor:
        """The states of a row by transformers' own attention, (time, width)."""
        with self._own_attention():
            states: Tensor = self.base(**self._arguments(row), past_key_values=WATCH.now)[0]
        return states[0]

    def _find_base(self) -> nn.Module:
        """The part of the model that its own forward calls: all but the head."""
        called: list[nn.Module] = []
        hooks = [
            part.register_forward_pre_hook(lambda part, _: called.append(part))
            for part in self._module.modules()
            if part is not self._module
        ]
        try:
            with self._own_attention():
                arguments = self._arguments(self._rows[0])
                self._logits: Tensor = (
                    self._module(**arguments, past_key_values=WATCH.now).logits[0].float()
                )
        finally:
            for hook in hooks:
                hook.remove()
        base = called[0]
        if not any(part is layer.attention for part in base.modules() for layer in self._seen):
            raise _refusal(self._module, "its head is not separate from the rest")
        return base

    def _find_layers(self) -> Sequence[nn.Module]:
        """The layers, if there is one list of them, each with one attention; else none."""
        attentions = {layer.attention for layer in self._seen}
        for part in self.base.modules():
            if isinstance(part, nn.ModuleList) and len(part) == len(attentions):
                found = [sum(each in attentions for each in layer.modules()) for layer in part]
                if found == [1] * len(part) and self._return_states(part):
                    return list(part)
        return []

    def _return_states(self, layers: nn.ModuleList) -> bool:
        """Whether each layer returns a state of the width for each token."""
        shapes: list[Any] = []

        def note(_: nn.Module, __: Any, returned: Any) -> None:
            state = returned if isinstance(returned, Tensor) else returned[0]
            shapes.append(state.shape)

        hooks = [layer.register_forward_hook(note) for layer in layers]
        with self._explaining(), torch.inference_mode():
            self._own_states(self._rows[0])
        for hook in hooks:
            hook.remove()
        return shapes == [(1, len(self._rows[0]), self.width)] * len(layers)

    def _arguments(self, row: Sequence[int]) -> dict[str, Any]:
        device = self._module.get_input_embeddings().weight.device
        return {
            "input_ids": torch.tensor([list(row)], device=device),
            "position_ids": torch.arange(len(row), device=device)[None],
            "use_cache": True,
        }

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        self._seen = []
        WATCH.now, WATCH.own_attention, WATCH.sights = Pass(None), self._attend, {}
        try:
            yield
        finally:
            WATCH.now = WATCH.own_attention = None

    def _attend(
        self,
        attention: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        layer: int,
        how: Attending,
        more: dict[str, Any],
    ) -> Tensor:
        """transformers' own attention; notes what the layer's is like."""
        for name, value in more.items():
            if isinstance(value, Tensor) and name not in _KNOWN:
                raise IncompatibleError(f"its attention depends on {name}, which gptk's does not")
        own = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        if own is None:
            raise IncompatibleError("its class has no attention that gptk's can replace")
        query, key, value = qkv
        size = max(query.shape[3], value.shape[3])
        self._seen.append(_Layer(attention, query.shape[1], key.shape[1], size))
        self._cached = max(self._cached, layer + 1)
        steps = torch.arange(query.shape[2], device=query.device)
        unseen = steps > steps[:, None]
        mask = torch.zeros_like(unseen, dtype=query.dtype)
        mask.masked_fill_(unseen, torch.finfo(mask.dtype).min)
        given = {"softcap": how.softcap, "s_aux": how.sinks}
        given = {name: value for name, value in given.items() if value is not None}
        y: Tensor = own(attention, *qkv, mask[None, None], scaling=how.scale, **given, **more)[0]
        return y

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Whatever is raised, as the reason why gptk cannot run the model."""
        try:
            yield
        except Exception as error:
            if isinstance(error, IncompatibleError) and "cannot run" in str(error):
                raise
            raise _refusal(self._module, str(error).strip().partition("\n")[0]) from error


def _are_close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-3 * want.abs().max().clamp(min=1))


def _refusal(module: nn.Module, reason: str) -> IncompatibleError:
    return IncompatibleError(f"gptk cannot run {type(module).__name__} of transformers': {reason}")


_ROWS = [[3, 1, 4, 1, 5], [2, 7]]
"""Tokens that are read."""
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_ALONE = "gptk keeps keys and values alone"
_KNOWN = {"position_ids", "cache_position", "attention_mask"}
"""Tensors that attention functions get of models without need."""
