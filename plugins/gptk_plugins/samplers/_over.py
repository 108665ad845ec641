"""The base of strategies that rest on another one, which does the choosing."""

import functools
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

import gptk


class Over(gptk.Sampler):
    """Does all that the sampler named by its option `sampler` does."""

    sampler: str = Field("multinomial", description="the sampler that chooses the tokens, a spec")

    @functools.cached_property
    def base(self) -> gptk.Sampler:
        return gptk.plugins.create("sampler", self.sampler, gptk.Sampler)

    def processors(self) -> Sequence[gptk.LogitsProcessor]:
        return self.base.processors()

    def hidden_layers(self, config: gptk.ModelConfig) -> Sequence[int]:
        return self.base.hidden_layers(config)

    def refuses_draft(self) -> str | None:
        return self.base.refuses_draft()

    def start(self, run: gptk.Run) -> object:
        return self.base.start(run)

    def logits(self, session: gptk.DecodeSession) -> Tensor:
        return self.base.logits(session)

    def advance(self, run: gptk.Run) -> None:
        self.base.advance(run)

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        return self.base.step(logits, rows)
