"""A smaller draft model with the same vocabulary (Leviathan et al. 2023, Chen et al. 2023).

It guesses with the run's own sampler, processors and random numbers, on the smaller model's logits.
Where the two models' distributions agree, so do their tokens.
"""

import functools
import os
import threading
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor

import gptk

_Quantize = Literal["auto", "none", "int8", "int4"]


class ModelDrafter(gptk.Drafter):
    """Guesses the tokens that a smaller model would choose."""

    name = "model"
    example = "source=smollm2,tokens=5"
    positional = "source"
    model_config = ConfigDict(arbitrary_types_allowed=True)

    source: str | SkipJsonSchema[gptk.LanguageModel] = Field(
        description="the model, as --model names it"
    )
    tokens: int = Field(5, ge=1, description="the most tokens to guess at a time")
    quantize: _Quantize = Field(
        "auto", description="what becomes of its weights, as --quantize says for the model's"
    )

    @classmethod
    def matches(cls, source: object) -> bool:
        return isinstance(source, str | gptk.LanguageModel)

    def start(self, run: gptk.Run) -> gptk.Draft:
        model = run.session.model
        lm = self.source
        if isinstance(lm, str):
            dtype = str(model.dtype).removeprefix("torch.")
            lm = _last.load(lm, str(model.device), dtype, self.quantize)
            self._files[:] = lm.files_read()
        _check_vocabulary(lm, model, run.tokenizer)
        return ModelDraft(lm.model, run.session.rows, self.tokens)

    def files_read(self) -> Sequence[gptk.plugins.ReadFile]:
        return self._files if isinstance(self.source, str) else self.source.files_read()

    @functools.cached_property
    def _files(self) -> list[gptk.plugins.ReadFile]:
        """Those of the model that the last run has loaded."""
        return []


class ModelDraft(gptk.Follower):
    """A session of the smaller model with the same rows."""

    def __init__(self, model: gptk.CausalModel, rows: gptk.Rows, tokens: int) -> None:
        first_rows = [rows.prompts.index(prompt) for prompt in range(max(rows.prompts) + 1)]
        # Ids beyond this vocabulary, which pad the other model's, become this one's last id.
        self._last = model.config.vocab_size - 1
        clamped = rows.tokens.clamp(max=self._last)
        prompts = [clamped[row, : rows.lengths[row]].tolist() for row in first_rows]
        # It never slides: once the window is full, `propose` guesses nothing.
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
            # Vocabularies are padded to round sizes; tokens of the padding are never drawn.
            missing = vocabulary - logits.shape[-1]
            return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits

        return run.guess(next_logits, count)

    def extend(self, tokens: Tensor) -> None:
        self._session.move(tokens.clamp(max=self._last))

    def select(self, parents: Sequence[int]) -> None:
        self._session.select(parents)

    def rewind(self, counts: Sequence[int]) -> None:
        self._session.rewind(counts)


class _LastModel:
    """The model of the last call, because the next call likely uses it again."""

    def __init__(self) -> None:
        self._arguments: tuple[str, ...] = ()
        self._lm: gptk.LanguageModel | None = None
        self._lock = threading.Lock()
        """Held while a model is loaded, so that threads that need the same load it once."""

    def load(self, source: str, device: str, dtype: str, quantize: _Quantize) -> gptk.LanguageModel:
        """The model as its files are now."""
        # A relative path is another file once the process has gone to another folder.
        arguments = (os.path.abspath(source), source, device, dtype, quantize)
        with self._lock:
            if self._lm is None or self._arguments != arguments or not self._lm.is_unchanged():
                self._lm = None  # so that two are never in memory
                self._lm = gptk.load(source, device=device, dtype=dtype, quantize=quantize)
                self._arguments = arguments
            return self._lm


_last = _LastModel()


def _check_vocabulary(
    lm: gptk.LanguageModel, model: gptk.CausalModel, tokenizer: gptk.Tokenizer | None
) -> None:
    sizes = lm.model.config.vocab_size, model.config.vocab_size
    try:
        draft_tokenizer: gptk.Tokenizer | None = lm.tokenizer
    except gptk.TokenizerError:
        draft_tokenizer = None
    if draft_tokenizer is None or tokenizer is None:
        if sizes[0] != sizes[1]:
            raise gptk.OptionError(
                f"the draft has a vocabulary of {sizes[0]} tokens and the model one of {sizes[1]}; "
                "a draft needs the model's own"
            )
    elif (
        draft_tokenizer is not tokenizer
        and (token := _first_difference(draft_tokenizer, tokenizer, min(sizes))) >= 0
    ):
        raise gptk.OptionError(
            f"the draft's vocabulary is not the model's: token {token} is "
            f"{draft_tokenizer.token_bytes(token)!r} in the draft's and "
            f"{tokenizer.token_bytes(token)!r} in the model's"
        )


@functools.lru_cache(maxsize=8)
def _first_difference(first: gptk.Tokenizer, second: gptk.Tokenizer, size: int) -> int:
    """The first token id below `size` that two tokenizers decode differently, or -1."""
    different = (id for id in range(size) if first.token_bytes(id) != second.token_bytes(id))
    return next(different, -1)
