"""A model as runs see it: what they ask of it waits for the engine's next pass."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from gptk.engine.passes import Passes
from gptk.engine.reading import LogitsWanted, Reading
from gptk.model.blocks import BlockCache
from gptk.model.protocol import Cache, CausalModel, ModelConfig, Step


class JoinedModel:
    """A `gptk.CausalModel` whose passes are joined with those that other runs want of it.

    Anything else that the model has is its own.
    """

    def __init__(self, model: CausalModel, passes: Passes) -> None:
        self._model, self._passes = model, passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def module(self) -> CausalModel:
        """The model itself."""
        return self._model

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def step(self) -> Step | None:
        return self._model.step

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """A cache in blocks, or the model's own where this or its compiled step needs it."""
        return self._passes.new_cache(self._model, rows, capacity)

    def states(
        self,
        ids: Tensor,
        cache: Any,
        counts: list[int] | None = None,
        layers: Collection[int] = (),
    ) -> Tensor:
        if isinstance(cache, BlockCache):
            return self._passes.wait_for(Reading(ids, cache, counts, layers))
        return self._model.states(ids, cache, counts, layers)

    def last_state(self, ids: Tensor, cache: BlockCache, layers: Collection[int] = ()) -> Tensor:
        """`states` of each row's last token alone: (rows, 1, 1 + layers, width)."""
        return self._passes.wait_for(Reading(ids, cache, None, layers, wanted=1))

    def logits(self, states: Tensor) -> Tensor:
        return self._passes.wait_for(LogitsWanted(states))
