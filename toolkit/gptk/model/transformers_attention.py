"""What transformers calls for attention, masks and its cache in a model that gptk runs.

transformers has registers for attention and for masks: a model whose configuration names `gptk`
gets from `attend` what its layers need, and from `_sight` instead of masks what these would say.
Its Cache hands on the new keys and values of each layer, which `attend` then stores in blocks.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from gptk.errors import IncompatibleError
from gptk.model.attention import Attending
from gptk.model.joined import JoinedSlots

NAME = "gptk"
"""In transformers' registers."""


class Pass(Cache):
    """The cache that a model of transformers' gets in a pass: where its tokens go in gptk's."""

    def __init__(self, slots: JoinedSlots | None) -> None:
        """slots: None lets transformers' own attention run, and nothing is kept."""
        super().__init__(layers=[])
        self.slots = slots
        self._layer_of: dict[int, tuple[int, Tensor]] = {}
        """The layer of keys, by their identity; and the keys, so that it stays theirs."""
        self._unused: int | None = None
        """The layer whose keys came last, if it has not attended yet."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Note whose keys these are; `attend` gets them next, and stores them."""
        self._unused = layer_idx
        self._layer_of[id(key_states)] = layer_idx, key_states
        return key_states, value_states

    def layer_of(self, keys: Tensor) -> int:
        """The layer whose keys these are: another one than that which attends, if layers share
        them. Keys that are not known are made of those that came last (DeepSeek)."""
        layer, self._unused = self._unused, None
        if id(keys) in self._layer_of:
            return self._layer_of[id(keys)][0]
        if layer is None:
            raise IncompatibleError("it attends to keys that were not given to the cache")
        self._layer_of[id(keys)] = layer, keys
        return layer


@dataclass
class Watch(threading.local):
    """What the thread's pass is for."""

    now: Pass | None = None
    """None outside of passes."""
    own_attention: "Callable[..., Tensor] | None" = None
    """Computes what `attend` is asked for as transformers does, where a pass has no slots."""
    sights: dict[int | None, Attending] = field(default_factory=dict)
    """What the model's masks let tokens see (window or chunk), by the size that it asked for."""


WATCH = Watch()


def _sight(
    *, mask_function: Callable[..., Tensor], local_size: int | None = None, **more: Any
) -> Attending:
    """Registered as the function that makes masks. What a model asked for before, by the size of
    its windows, it gets without another comparison."""
    if more.get("use_vmap"):  # the mask has parts of the model's own
        return _recognized(local_size, mask_function)
    if local_size not in WATCH.sights:
        WATCH.sights[local_size] = _recognized(local_size, mask_function)
    return WATCH.sights[local_size]


def _recognized(size: int | None, function: Callable[..., Tensor]) -> Attending:
    """Compare a mask with those that there are, around the places where they differ."""
    near = {0, 1, 2, 3}
    for multiple in (1, 2, 3):
        near |= {multiple * (size or 5) + shift for shift in (-2, -1, 0, 1)}
    positions = torch.tensor(sorted(number for number in near if number >= 0))
    queries, keys = positions[:, None], positions[None, :]
    seen = function(torch.tensor(0), torch.tensor(0), queries, keys)
    known = {Attending(): keys <= queries}
    if size is not None:
        known[Attending(window=size)] = (keys <= queries) & (keys > queries - size)
    if size:
        known[Attending(chunk=size)] = (keys <= queries) & (keys // size == queries // size)
    for sight, mask in known.items():
        if torch.equal(seen.broadcast_to(mask.shape), mask):
            return sight
    raise IncompatibleError(
        "what its tokens see of each other is neither all before them, nor a sliding window, nor "
        "a chunk"
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Attending | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Registered as the function for attention: stores a layer's keys and values, and attends.

    query: (1, heads, tokens, d), key, value: (1, kv_heads, tokens, d), the tokens of all rows one
    after the other. Returns (1, tokens, heads, d), and no weights.
    """
    now = WATCH.now
    if now is None:
        raise IncompatibleError(f"{type(module).__name__} is run by gptk; ask gptk for its states")
    layer, d = now.layer_of(key), query.shape[3]
    how = replace(
        Attending() if attention_mask is None else attention_mask,
        scale=d**-0.5 if scaling is None else float(scaling),
        softcap=softcap,
        sinks=getattr(module, "sinks", None) if s_aux is None else s_aux,
    )
    if now.slots is None:
        assert WATCH.own_attention is not None
        return WATCH.own_attention(module, (query, key, value), layer, how, more), None
    size = max(d, value.shape[3])
    parts = [query, key, value]
    if value.shape[3] != d:
        parts = [F.pad(x, (0, size - x.shape[3])) for x in parts]
    qkv = torch.cat([x.transpose(1, 2) for x in parts], dim=2)
    y = now.slots.attend(qkv, layer, how).view(1, -1, query.shape[1], size)
    return y if value.shape[3] == size else y[..., : value.shape[3]], None


def register() -> None:
    """Let transformers find what is here."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _sight)
