"""The base class of strategies that wrap another sampler, which chooses the tokens."""

import functools
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

import gptk


class WrappingSampler(gptk.Sampler):
    """Passes every call on to the sampler named by the option `sampler`."""

    sampler: str = Field("multinomial", description="the sampler that chooses the tokens, a spec")

    @functools.cached_property
    def wrapped(self) -> gptk.Sampler:
        return gptk.plugins.create("sampler", self.sampler, gptk.Sampler)

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return self.wrapped.processors()

    def hidden_layers(self, config: gptk.ModelConfig) -> Sequence[int]:
        return self.wrapped.hidden_layers(config)

    def refuses_draft(self) -> str | None:
        return self.wrapped.refuses_draft()

    def start(self, run: gptk.Run) -> object:
        return self.wrapped.start(run)

    def logits(self, session: gptk.DecodeSession) -> Tensor:
        return self.wrapped.logits(session)

    def advance(self, run: gptk.Run) -> None:
        self.wrapped.advance(run)

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        return self.wrapped.step(logits, rows)
