"""Logits processors and stopping criteria to and from Hugging Face transformers.

    from gptk.adapters.transformers import from_transformers, to_transformers

    lm.generate(prompt, processors=[from_transformers(TypicalLogitsWarper(0.9))])
    model.generate(**inputs, logits_processor=[to_transformers("min-p:p=0.1")])

Raises PluginError at import where transformers is not installed.
"""

import copy
import inspect
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

import gptk
from gptk.adapters._replay import Process, Replay

try:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation import logits_process, stopping_criteria
except ImportError:
    raise gptk.PluginError(
        "gptk.adapters.transformers needs a package: pip install 'gptk-decoding[transformers]'"
    ) from None

__all__ = ["from_stopping_criteria", "from_transformers", "to_transformers"]

Processors = logits_process.LogitsProcessor | logits_process.LogitsProcessorList
"""What transformers takes as processors."""


def from_transformers(
    processor: Processors, *, stateful: bool | None = None
) -> gptk.LogitsProcessor:
    """A transformers LogitsProcessor, or a list of them, as a logits processor of gptk.

    Each row is processed separately, without padding, so that it gets exactly what it would get
    alone. `PrefixConstrainedLogitsProcessor` is told the index of the row's prompt as batch_id.

    stateful: the processor remembers its earlier calls. Each row then has its own copy, which is
    copied when the row forks; drafts and samplers that take tokens back raise IncompatibleError.
    None: gptk knows which of transformers' processors are stateful; all others are taken for
    functions of tokens and scores.

    Raises OptionError for processors that are bound to one batch or to an audio model.
    """
    if isinstance(processor, ToTransformers) and len(processor.processors) == 1:
        return processor.processors[0]
    parts = _parts(processor)
    for part in parts:
        if problem := _problem(part):
            name = part.__name__ if isinstance(part, type) else type(part).__name__
            raise gptk.OptionError(f"{name} cannot be used in gptk: {problem}")
    if stateful is None:
        stateful = any(isinstance(part, _STATEFUL) for part in parts)
    return FromTransformers(processor=processor, stateful=stateful)


def from_stopping_criteria(
    criteria: "stopping_criteria.StoppingCriteria | stopping_criteria.StoppingCriteriaList",
) -> gptk.StopCondition:
    """A transformers StoppingCriteria, or a list of them, for `stop=[...]`.

    It is called for each row separately, with all its tokens, prompt included, and scores=None.
    `MaxTimeCriteria` counts from its creation.

    Raises OptionError for ConfidenceCriteria, which needs scores.
    """
    parts = list(criteria) if isinstance(criteria, list) else [criteria]
    for part in parts:
        if not isinstance(part, stopping_criteria.StoppingCriteria):
            raise gptk.OptionError(f"{part!r} is not a transformers StoppingCriteria")
        if isinstance(part, stopping_criteria.ConfidenceCriteria):
            raise gptk.OptionError(
                "ConfidenceCriteria needs the scores of each step, and a stop condition gets "
                "only tokens; it is meant for the draft model of assisted decoding"
            )

    def stop(tokens: list[int]) -> bool:
        ids = torch.tensor([tokens])
        return any(bool(torch.as_tensor(part(ids, None)).any()) for part in parts)

    return stop


def to_transformers(
    processors: str | gptk.LogitsProcessor | Sequence[str | gptk.LogitsProcessor],
    *,
    prompt_length: int | None = None,
    pad_token_id: int | None = None,
    num_beams: int | None = None,
    tokenizer: gptk.Tokenizer | PreTrainedTokenizerBase | None = None,
    model: gptk.CausalModel | None = None,
    eos: Sequence[int] | None = None,
    seed: int = 0,
) -> "ToTransformers":
    """One or more of gptk's processors, for `generate(logits_processor=[...])`.

    It follows the rows through greedy search, sampling, beam search and assisted decoding by
    comparing input_ids with those of the last call. Make a new one for each call of generate, or
    call `reset()` between two. Without that, a prompt that continues the last rows is taken for
    their next step.

    prompt_length: how many columns of input_ids are the prompt; default: those of the first call.
    pad_token_id: the padding on the left of shorter prompts, which belongs to no row.
    num_beams: that of `generate`, for processors that draw or ask for a row's prompt: beams of a
    prompt share its index and its random numbers, as in gptk. Default: each row has its own.
    tokenizer: for processors that need texts; a fast tokenizer of transformers will do.
    model: for processors that run the model themselves, as cfg does: the same model in gptk,
    `gptk.load(…).model`.
    eos: tokens that end a row, whose scores are not processed any more; default: the tokenizer's.
    seed: for processors that draw.

    Raises what `gptk.plugins.create` raises for a wrong spec, and TokenizerError for a tokenizer
    that cannot be read.
    """
    if tokenizer is not None and not isinstance(tokenizer, gptk.Tokenizer):
        tokenizer = _read_tokenizer(tokenizer)
    return ToTransformers(
        Replay(
            processors,
            prompt_length=prompt_length,
            pad_token_id=pad_token_id,
            num_beams=num_beams,
            tokenizer=tokenizer,
            model=model,
            eos=eos,
            seed=seed,
        )
    )


class ToTransformers(logits_process.LogitsProcessor):
    """gptk's processors as a processor of transformers; made by `to_transformers`."""

    supports_continuous_batching = False  # it does not give the tokens of each row

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    @property
    def processors(self) -> list[gptk.LogitsProcessor]:
        """gptk's processors, in their order."""
        return self._replay.processors

    def reset(self) -> None:
        """Forget the rows: the next call begins a new generation."""
        self._replay.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (rows, length). scores: (rows, vocab). New scores of the same type."""
        return self._replay(input_ids, scores)


class FromTransformers(gptk.LogitsProcessor):
    """A processor of transformers; made by `from_transformers`."""

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    name = "transformers"

    processor: Processors = pydantic.Field(description="what to call")
    stateful: bool = pydantic.Field(False, description="whether it remembers earlier calls")

    def start(self, rows: gptk.Rows) -> Process:
        if self.stateful:
            return _Stateful(self.processor, len(rows))
        # transformers' processors fill tables and seed generators while they run, and concurrent
        # generations must not share these. A user's functions are not copied.
        parts = [
            _copied([part])[0] if type(part).__module__ == logits_process.__name__ else part
            for part in _parts(self.processor)
        ]

        def process(logits: Tensor, rows: gptk.Rows) -> Tensor:
            return _each_row([parts] * len(rows), logits, rows)

        return process

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        """A single step."""
        return self.start(rows)(logits, rows)

    @property
    def spec(self) -> str:
        """Raises OptionError: an object has no spec string."""
        raise gptk.OptionError(
            f"{type(self.processor).__name__} of transformers has no spec string"
        )


class _Stateful(gptk.Follower):
    """A copy of the processors for each row, which must be called once for each token."""

    def __init__(self, processor: Processors, rows: int) -> None:
        self._name = type(processor).__name__
        self._copies = [_copied(_parts(processor)) for _ in range(rows)]
        self._unseen = [1] * rows
        """How many tokens each row has got since its copy was called; the prompt counts as 1."""
        self._last: tuple[Tensor, Tensor] | None = None

    def extend(self, tokens: Tensor) -> None:
        self._unseen = [unseen + tokens.shape[1] for unseen in self._unseen]

    def select(self, parents: Sequence[int]) -> None:
        old = self._copies
        # The first row that comes of a parent takes its copy, the others copy it.
        self._copies = [
            _copied(old[parent]) if parent in parents[:row] else old[parent]
            for row, parent in enumerate(parents)
        ]
        self._unseen = [self._unseen[parent] for parent in parents]
        self._last = None

    def rewind(self, counts: Sequence[int]) -> None:
        self._unseen = [unseen - n for unseen, n in zip(self._unseen, counts, strict=True)]
        if min(self._unseen) < 0:
            raise self._lost("taken back")

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        if max(self._unseen) == 0 and self._last and torch.equal(self._last[0], logits):
            return self._last[1]  # decoding repeats a call to explain an error
        if set(self._unseen) != {1}:
            raise self._lost("tried out" if min(self._unseen) == 0 else "added several at a time")
        self._unseen = [0] * len(rows)
        self._last = logits, _each_row(self._copies, logits, rows)
        return self._last[1]

    def _lost(self, what: str) -> gptk.IncompatibleError:
        return gptk.IncompatibleError(
            f"{self._name} keeps state that can only follow one token a step, and tokens were "
            f"{what}; use a sampler that does not look ahead and no draft, or stateful=False if "
            "the processor is a function of tokens and scores"
        )


_AUDIO = "it belongs to an audio model with an encoder or several codebooks"
_REFUSED = {
    "ClassifierFreeGuidanceLogitsProcessor": "it expects every row twice, with the prompt and "
    "without; UnbatchedClassifierFreeGuidanceLogitsProcessor does the same for single rows",
    "DiaClassifierFreeGuidanceLogitsProcessor": _AUDIO,
    "DiaEOSChannelFilterLogitsProcessor": _AUDIO,
    "DiaEOSDelayPatternLogitsProcessor": _AUDIO,
    "WhisperNoSpeechDetection": _AUDIO,
}
_STATEFUL = (
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


def _problem(part: Any) -> str | None:
    """Why a processor cannot process rows separately, or None."""
    name = type(part).__name__
    if isinstance(part, type) and issubclass(part, logits_process.LogitsProcessor):
        return f"it is a class; give an instance, {part.__name__}(…)"
    if isinstance(part, str | gptk.LogitsProcessor):
        return "it is gptk's own; give it to `processors` as it is"
    if not isinstance(part, logits_process.LogitsProcessor):
        return "it is not a transformers LogitsProcessor"
    if isinstance(part, ToTransformers):
        return "it is gptk's own; use its processors as they are"
    if extra := [*inspect.signature(part.__call__).parameters][2:]:
        return f"it needs {' and '.join(extra)}, which only its own model's generate gives"
    if name in _REFUSED:
        return _REFUSED[name]
    batch: Any = None
    if isinstance(part, logits_process.RepetitionPenaltyLogitsProcessor):
        batch = part.prompt_ignore_length
    elif isinstance(part, logits_process.EncoderRepetitionPenaltyLogitsProcessor):
        batch = part.encoder_input_ids
    elif isinstance(part, logits_process.EncoderNoRepeatNGramLogitsProcessor):
        batch = part.generated_ngrams
    elif isinstance(part, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor):
        batch = part.unconditional_context["input_ids"]
    if batch is not None and not isinstance(batch, int) and len(batch) > 1:
        return f"it was made for a batch of {len(batch)} rows; make it for one"
    return None


def _parts(processor: Processors) -> list[Any]:
    return list(processor) if isinstance(processor, list) else [processor]


def _copied(parts: list[Any]) -> list[Any]:
    """Copies that share no state with the originals but models and tokenizers."""
    shared = {
        id(value): value
        for part in parts
        for value in getattr(part, "__dict__", {}).values()
        if isinstance(value, nn.Module | PreTrainedTokenizerBase)
    }
    try:
        return copy.deepcopy(parts, shared)
    except Exception as error:
        names = ", ".join(type(part).__name__ for part in parts)
        raise gptk.OptionError(
            f"{names}: its state cannot be copied for each row ({type(error).__name__}: {error})"
        ) from None


def _each_row(parts: Sequence[list[Any]], logits: Tensor, rows: gptk.Rows) -> Tensor:
    """The logits of each row i after the processors parts[i], called without padding."""
    tokens = rows.tokens
    processed = []
    # A copy, since some processors write into their scores.
    for row, scores in enumerate(torch.split(logits.clone(), 1)):
        ids = tokens[row : row + 1, : rows.lengths[row]]
        for part in parts[row]:
            if isinstance(part, logits_process.PrefixConstrainedLogitsProcessor):
                allowed = partial(_allowed, part._prefix_allowed_tokens_fn, rows.ordinals[row])
                part = logits_process.PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
            scores = _scored(part, ids, scores)
        processed.append(scores)
    return torch.cat(processed).float()


def _scored(part: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """What a processor returns. Raises PluginError, which names it, if it fails."""
    name = f"{type(part).__name__}, a processor of transformers,"
    try:
        returned = part(ids, scores)
    except (gptk.GptkError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise gptk.PluginError(f"{name} failed: {what}") from error
    if not isinstance(returned, Tensor) or returned.shape != scores.shape:
        what = f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else returned
        raise gptk.PluginError(
            f"{name} returned {what!s:.60}; it must return scores of shape {tuple(scores.shape)}"
        )
    return returned


def _allowed(
    allowed: Callable[[int, Tensor], list[int]], prompt: int, row: int, tokens: Tensor
) -> list[int]:
    return allowed(prompt, tokens)


def _read_tokenizer(tokenizer: PreTrainedTokenizerBase) -> gptk.Tokenizer:
    if not getattr(tokenizer, "is_fast", False):
        raise gptk.TokenizerError(
            f"{type(tokenizer).__name__} has no tokenizer.json to read; give a fast tokenizer of "
            "transformers, or a gptk.Tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return gptk.load_tokenizer(folder)
