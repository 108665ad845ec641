"""Any causal language model of transformers', with keys and values in gptk's blocks.

The modules are transformers'; gptk gives them what `gptk.model.transformers_attention` registers
with transformers: its attention and its cache. The tokens of all rows are one sequence to the
model, without padding, as for a `GPT` (vLLM runs models of transformers' in this way, too). Nothing
here imports transformers before a model is made, so that who has none needs none.
"""

import contextlib
import threading
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptk.kernels.gpu import can_attend, tiling
from gptk.model.attention import Attending
from gptk.model.blocks import BlockCache
from gptk.model.budget import Budget
from gptk.model.graphs import MOST_TOKENS
from gptk.model.joined import JoinedSlots, Numbers, Part, read_into_caches, tokens_and_slots
from gptk.model.pool import BlockPool


@dataclass(frozen=True)
class TransformersConfig:
    """What strategies read of a model of transformers'; see `gptk.ModelConfig`."""

    architecture: str
    """The name of the class in transformers."""
    vocab_size: int
    context_length: int
    width: int
    n_layers: int
    """0 if what the layers return is not found, or not of that width."""
    tied_head: bool


@dataclass(frozen=True)
class BlockSizes:
    """What a block has room for; see gptk.model.pool.Sizes."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    window_of_all: None = None
    """What a layer sees is known when it is called: all is kept."""


class TransformersModel(nn.Module):
    """A causal language model of transformers' as a `gptk.CausalModel`.

    module: such as `AutoModelForCausalLM.from_pretrained(path)`. It is this model's from now on:
    its attention is gptk's, and its own `forward` and `generate` cannot be called. context_length:
    the most tokens of a row [as its configuration says].

    A few tokens are read to find the sizes of keys and values, and to compare gptk's attention in
    each layer with transformers' own. Raises IncompatibleError, with the reason, for a model that
    does not keep what it has read in keys and values alone (Mamba, hybrids), that has an encoder,
    or whose attention cannot be replaced.
    """

    def __init__(self, module: nn.Module, context_length: int | None = None) -> None:
        from gptk.model.transformers_probe import Probe, check_class, window_of

        check_class(module)
        super().__init__()
        self.module: Any = module.eval()
        window = window_of(module)
        window = min(window, context_length or window)
        self._states = threading.local()
        """`given`: states for the head to read, so that no tokens are read; `kept`: what layers
        return in a pass."""
        self._sights: dict[int | None, Attending] = {}
        probe = Probe(module)
        self.sizes = BlockSizes(*probe.sizes())
        """What a block of its keys and values has room for."""
        self._heads = probe.heads
        self._put_base(probe.base)
        self._put_layers(probe.layers)
        config: Any = self.module.config
        self.config = TransformersConfig(
            architecture=type(module).__name__,
            vocab_size=config.get_text_config(decoder=True).vocab_size,
            context_length=window,
            width=probe.width,
            n_layers=len(probe.layers),
            tied_head=bool(getattr(config, "tie_word_embeddings", False)),
        )
        probe.compare(self)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        embedding: Tensor = self.module.get_input_embeddings().weight
        return embedding

    def new_cache(self, rows: int, capacity: int) -> "OwnCache":
        """A cache in blocks of its own, for passes that are not joined with others."""
        pool = BlockPool(self.sizes, self.device, self.dtype, Budget(self.device))
        return OwnCache(BlockCache(pool, rows))

    def states(
        self,
        ids: Tensor,
        cache: "OwnCache | None" = None,
        counts: list[int] | None = None,
        layers: Collection[int] = (),
    ) -> Tensor:
        """See `gptk.CausalModel.states`."""
        rows, time = ids.shape
        blocks = (self.new_cache(rows, time) if cache is None else cache).blocks
        sizes = [time] * rows if counts is None else counts
        tokens = [array("q", row[:size]) for row, size in zip(ids.tolist(), sizes, strict=True)]
        parts = [Part(blocks, row, new, len(new)) for row, new in enumerate(tokens) if new]
        states = read_into_caches(
            parts, lambda pool: self.read_blocks(pool, parts, layers), beyond=True
        )
        if min(sizes) == time:
            return states.view(rows, time, *states.shape[1:])
        padded = states.new_zeros(rows, time, *states.shape[1:])
        for row, new in zip(padded, torch.split(states, sizes), strict=True):
            row[: len(new)] = new
        return padded

    def read_blocks(
        self, pool: BlockPool, parts: Sequence[Part], layers: Collection[int] = ()
    ) -> Tensor:
        """Read the tokens of all parts, whose caches have blocks for them.

        Returns (wanted tokens of all parts, 1 + layers, width).
        """
        group = self._heads // self.sizes.n_kv_heads
        division = None
        if can_attend(pool.device, pool.dtype, self.sizes.head_dim, group):
            few = sum(len(part.tokens) for part in parts) <= MOST_TOKENS
            division = tiling(pool.dtype, few=few)
        numbers = Numbers(parts, None if division is None else division.tokens(group))
        tokens, slots = tokens_and_slots(pool, numbers, self._heads, division)
        kept: dict[int, Tensor] = {}
        with self._reading(slots, kept if layers else None) as cache:
            base: Any = self._base
            final: Tensor = base(
                input_ids=tokens,
                position_ids=slots.positions,
                past_key_values=cache,
                use_cache=True,
            )[0]
        states = torch.stack([final[0], *(kept[layer][0] for layer in layers)], dim=1)
        return states if slots.wanted is None else states[slots.wanted]

    def logits(self, states: Tensor) -> Tensor:
        """See `gptk.CausalModel.logits`."""
        self._states.given = states.reshape(1, -1, states.shape[-1])
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=states.device)
            logits: Tensor = self.module(input_ids=token, use_cache=False).logits
        finally:
            self._states.given = None
        return logits.float().view(*states.shape[:-1], -1)

    @contextlib.contextmanager
    def _reading(self, slots: JoinedSlots, kept: dict[int, Tensor] | None) -> Iterator[Any]:
        """A pass of this thread, in which attention finds the slots. kept: gets the states of the
        layers, (1, tokens, width) each."""
        from gptk.model.transformers_attention import WATCH, Pass

        WATCH.now, WATCH.sights = Pass(slots), self._sights
        self._states.kept = kept
        try:
            yield WATCH.now
        finally:
            WATCH.now = self._states.kept = None

    def _put_base(self, base: nn.Module) -> None:
        """Let the model's head read states that it is given, where it would call the base."""
        own, states = base.forward, self._states

        def forward(*args: Any, **settings: Any) -> Any:
            given = getattr(states, "given", None)
            return own(*args, **settings) if given is None else _Given(given)

        base.forward = forward
        object.__setattr__(self, "_base", base)  # a part of the module already

    def _put_layers(self, layers: Sequence[nn.Module]) -> None:
        """Keep what the layers return, and what the first one reads, in passes that ask for it."""
        states = self._states

        def keep(layer: int, state: Tensor) -> None:
            kept = getattr(states, "kept", None)
            if kept is not None:
                kept[layer] = state

        def before(_: nn.Module, args: Any, settings: Any) -> None:
            keep(0, args[0] if args else settings["hidden_states"])

        def after(number: int, returned: Any) -> None:
            keep(number, returned if isinstance(returned, Tensor) else returned[0])

        for number, layer in enumerate(layers, start=1):
            if number == 1:
                layer.register_forward_pre_hook(before, with_kwargs=True)
            layer.register_forward_hook(
                lambda _module, _args, returned, number=number: after(number, returned)
            )


class _Given:
    """What a base model would return: states, and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class OwnCache:
    """Blocks that nobody else has, see `gptk.model.protocol.Cache`."""

    def __init__(self, blocks: BlockCache) -> None:
        self.blocks = blocks

    @property
    def lengths(self) -> Sequence[int]:
        return self.blocks.lengths

    def select(self, parents: Sequence[int]) -> None:
        self.blocks.select(parents)

    def rewind(self, counts: Sequence[int]) -> None:
        self.blocks.rewind(counts)

    def clear(self) -> None:
        self.blocks.clear()
