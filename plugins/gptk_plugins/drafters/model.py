"""A smaller model of the same vocabulary as draft (Leviathan et al. 2023, Chen et al. 2023).

It guesses by the very rules of the run: the sampler and all processors, on its own logits, with
the row's own random numbers. Where the two models' distributions agree, so do their tokens.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor

import gptk


class ModelDrafter(gptk.Drafter):
    """Guesses the tokens that a smaller model would choose."""

    name = "model"
    example = "source=smollm2,tokens=5"
    model_config = ConfigDict(arbitrary_types_allowed=True)

    source: str | SkipJsonSchema[gptk.LanguageModel] = Field(
        description="the model, as --model names it"
    )
    tokens: int = Field(5, ge=1, description="the most tokens to guess at a time")
    quantize: Literal["int8", "int4", "stored"] | None = Field(
        None,
        description="what its weights are rounded to on a CPU; stored: as in its file",
    )

    @classmethod
    def matches(cls, source: object) -> bool:
        return isinstance(source, str | gptk.LanguageModel)

    def start(self, run: gptk.Run) -> gptk.Draft:
        model = run.session.model
        lm = self.source
        if isinstance(lm, str):
            dtype = str(model.dtype).removeprefix("torch.")
            lm = _loaded(lm, str(model.device), dtype, self.quantize)
        _check_vocabulary(lm, model, run.tokenizer)
        return ModelDraft(lm.model, run.session.rows, self.tokens)


class ModelDraft(gptk.Follower):
    """A session of the smaller model with the same rows."""

    def __init__(self, model: gptk.CausalModel, rows: gptk.Rows, tokens: int) -> None:
        firsts = [rows.prompts.index(prompt) for prompt in range(max(rows.prompts) + 1)]
        # Tokens that only the other model's padding has: any will do in their place.
        self._last = model.config.vocab_size - 1
        known = rows.tokens.clamp(max=self._last)
        prompts = [known[row, : rows.lengths[row]].tolist() for row in firsts]
        # It never slides: a draft whose window is full guesses no more.
        self._session = gptk.DecodeSession(model, prompts, overflow="slide")
        self._session.select(rows.prompts)
        self._tokens = tokens

    def propose(self, run: gptk.Run, count: int) -> Tensor | None:
        session = self._session
        room = session.model.config.context_length - max(session.rows.lengths)
        count = min(count, self._tokens, room)
        if count <= 0:
            return None
        vocabulary = run.session.model.config.vocab_size

        def next_logits() -> Tensor:
            logits = session.logits if all(session.known) else session.read()[:, -1]
            # Vocabularies are padded to round sizes; nothing is drawn from padding.
            more = vocabulary - logits.shape[-1]
            return F.pad(logits, (0, more), value=-torch.inf) if more else logits

        return run.guess(next_logits, count)

    def extend(self, tokens: Tensor) -> None:
        self._session.move(tokens.clamp(max=self._last))

    def select(self, parents: Sequence[int]) -> None:
        self._session.select(parents)

    def rewind(self, counts: Sequence[int]) -> None:
        self._session.rewind(counts)


@functools.lru_cache(maxsize=1)
def _loaded(
    source: str, device: str, dtype: str, quantize: Literal["int8", "int4", "stored"] | None
) -> gptk.LanguageModel:
    """The draft of the call before is likely that of the next one."""
    return gptk.load(source, device=device, dtype=dtype, quantize=quantize)


def _check_vocabulary(
    lm: gptk.LanguageModel, model: gptk.CausalModel, tokenizer: gptk.Tokenizer | None
) -> None:
    sizes = lm.model.config.vocab_size, model.config.vocab_size
    try:
        own: gptk.Tokenizer | None = lm.tokenizer
    except gptk.TokenizerError:
        own = None
    if own is None or tokenizer is None:
        if sizes[0] != sizes[1]:
            raise gptk.OptionError(
                f"the draft has a vocabulary of {sizes[0]} tokens and the model one of {sizes[1]}; "
                "a draft needs the model's own"
            )
    elif own is not tokenizer and (token := _first_difference(own, tokenizer, min(sizes))) >= 0:
        raise gptk.OptionError(
            f"the draft's vocabulary is not the model's: token {token} is "
            f"{own.token_bytes(token)!r} there and {tokenizer.token_bytes(token)!r} here"
        )


@functools.lru_cache(maxsize=8)
def _first_difference(one: gptk.Tokenizer, other: gptk.Tokenizer, size: int) -> int:
    """The first token id that two tokenizers read differently, or -1."""
    different = (id for id in range(size) if one.token_bytes(id) != other.token_bytes(id))
    return next(different, -1)
