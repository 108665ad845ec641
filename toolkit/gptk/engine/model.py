"""A model as runs see it: what they ask of it waits for the engine's next pass."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from gptk.engine.passes import Passes
from gptk.engine.reading import LogitsWanted, Reading
from gptk.model.blocks import BlockCache
from gptk.model.protocol import Cache, CausalModel, ModelConfig


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

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """A cache in blocks, or the model's own if it must have that."""
        return self._passes.new_cache(self._model, rows, capacity)

    def states(
        self,
        ids: Tensor,
        cache: Any,
        counts: list[int] | None = None,
        layers: Collection[int] = (),
        wanted: int | None = None,
    ) -> Tensor:
        """As of any model. wanted: of how many of each row's tokens, the last ones [all]; not
        together with counts."""
        if isinstance(cache, BlockCache):
            states: Tensor = self._passes.wait_for(Reading(ids, cache, counts, layers, wanted))
            return states
        states = self._model.states(ids, cache, counts, layers)
        return states if wanted is None else states[:, -wanted:]

    def states_and_logits(
        self,
        ids: Tensor,
        cache: BlockCache,
        layers: Collection[int] = (),
        wanted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`states`, and `logits` of the final ones, for which a run waits once.

        wanted: of how many of each row's tokens, the last ones [all].
        """
        reading = Reading(ids, cache, None, layers, wanted, with_logits=True)
        answer: tuple[Tensor, Tensor] = self._passes.wait_for(reading)
        return answer

    def logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self._passes.wait_for(LogitsWanted(states))
        return logits
