"""The public face: load a model, then generate, stream, chat and score."""

import dataclasses
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from gptk.decoding.awaiting import awaited, pieces
from gptk.decoding.limits import StopCondition
from gptk.decoding.many import Job, respond
from gptk.decoding.prompts import Prompt, check_pair, check_vocabulary, encode_text, read_ids
from gptk.decoding.requests import Request, Response
from gptk.decoding.settings import CheckedSettings, check_settings
from gptk.decoding.stream import Stream
from gptk.engine import scoring
from gptk.engine.scoring import ContinuationScore, Score
from gptk.errors import GptkError, PromptError, TokenizerError
from gptk.hooks.drafting import Drafter
from gptk.hooks.observing import DecodingObserver
from gptk.hooks.results import Generation, shortened
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.model.protocol import CausalModel
from gptk.model.quantization import Quantize, check_quantize
from gptk.session.session import Overflow
from gptk.system import collector
from gptk.system.devices import resolve_device, resolve_dtype
from gptk.system.read_files import ReadFile
from gptk.text.fingerprint import fingerprint
from gptk.text.tokenizer import Tokenizer
from gptk.weights.building import log_loading, make_model
from gptk.weights.loading import default_source, load_checkpoint
from gptk.weights.origin import Origin
from gptk.weights.saving import save_checkpoint
from gptk.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from gptk.text.chat import Message


class Settings(TypedDict, total=False):
    """The settings of a generation; the defaults are in brackets."""

    sampler: str | Sampler | None
    """A spec string or an instance [greedy; with a processor that is meant for sampling, such as
    temperature or top-p, multinomial]."""
    processors: Iterable[str | LogitsProcessor]
    """Logits processors, applied in order, before those of the sampler [none]."""
    max_new_tokens: int
    """For each prompt [64]."""
    n: int
    """How many results for each prompt; those after the first are in `.alternatives` [1]."""
    seed: int | None
    """From -2^63 to 2^64 - 1; the result reports it [a new one each time]."""
    ordinal: int
    """The number of the first prompt, and those after it count on: with the seed and the prompt it
    decides what is drawn, so that equal prompts of a call get different texts, and a text can be
    drawn again alone [0]."""
    stop: "str | StopCondition | Iterable[str | StopCondition]"
    """One or several, each a text that ends the continuation, or a function that is called after
    each new token with the row's tokens, prompt first, and says whether it ends [none]."""
    draft: "str | Drafter | LanguageModel | None"
    """Guesses tokens ahead, for the same result sooner: a model, or a drafter such as
    lookup:ngram=3,tokens=8 [none]."""
    overflow: Overflow
    """When the model's window is full: stop or slide, see DecodeSession [stop]."""
    max_seconds: float | None
    """A limit on time [none]."""
    ignore_eos: bool
    """Go on after the end of the text [False]."""
    use_cache: bool
    """Use a KV cache; without it the results are the same, but slow [True]."""
    observers: Iterable[str | DecodingObserver]
    """Plug-ins that see every step, such as trace:path=steps.jsonl [none]."""
    top_logprobs: int
    """How many of the likeliest tokens of each step the result has in `.top_logprobs`, before and
    after the processors [0]."""


@collector.paused()
def load(
    source: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Quantize = "auto",
    tokenizer: "str | Tokenizer | None" = None,
) -> "LanguageModel":
    """Load a language model.

    source: `smollm2`, a path, a hub id or a loader spec; by default $GPTK_MODEL, else SmolLM2
    where it is installed. device: auto (cuda, mps or cpu) or a name. dtype: auto (bfloat16 on
    GPUs that have it, float32 on CPUs), float32, bfloat16 or float16. quantize: auto keeps matrices
    that a GGUF file has in one of most formats as they are on a CPU, where gptk's kernels run or
    dtype is bfloat16, and dequantizes them elsewhere; none dequantizes all; int8 and int4 round the
    linear layers' weights of any model (see GPT.quantize; on CUDA by torchao). tokenizer: instead
    of the model's own.

    Raises SourceError, TokenizerError, DeviceError or OptionError.
    """
    target_device = resolve_device(device)
    check_quantize(quantize, target_device)
    target_dtype = resolve_dtype(dtype, target_device)
    start = time.perf_counter()
    # Quantized matrices are read as they are stored, since they are small. Those that the model
    # needs dense are dequantized by build_model, one at a time.
    name = str(source or default_source())
    checkpoint = load_checkpoint(name, stored=True)
    origin = Origin.of(checkpoint, name, quantize)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    elif tokenizer is None and checkpoint.tokenizer is not None:
        tokenizer = checkpoint.tokenizer()

    model = make_model(checkpoint, target_device, target_dtype, quantize)
    log_loading(checkpoint, model, time.perf_counter() - start)
    return LanguageModel(model, tokenizer, origin)


class LanguageModel:
    """A model and its tokenizer. Without a tokenizer, prompts are token ids and texts are empty.

    model: a gptk.GPT, or any other object that does what gptk.CausalModel asks for. origin: where
    it was loaded from, which `load` says.

    Several threads may use it at the same time, each with a call or a stream of its own.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._origin = origin

    @property
    def source(self) -> str | None:
        """What it was loaded from, as it was given, or the default; None if it was not loaded."""
        return None if self._origin is None else self._origin.source

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError if there is none."""
        if self._tokenizer is None:
            raise TokenizerError(
                "the model comes without a tokenizer; name one, such as --tokenizer gpt2, "
                "or give token ids"
            )
        return self._tokenizer

    def generate(self, prompt: Prompt = "", **settings: Unpack[Settings]) -> Generation:
        """Continue one prompt; an empty one starts from the model's BOS or end-of-text token.

        Raises PromptError, OptionError, UnknownNameError, SpecError or DecodingError.
        """
        return self._stream(prompt, check_settings(**settings)).run()

    def generate_batch(
        self, prompts: "Sequence[Prompt | Request]", **settings: Unpack[Settings]
    ) -> list[Generation]:
        """Continue several prompts at once, see `generate_many`; two equal calls give the same to
        the last digit. Raises the error of the first that fails."""
        results = []
        for response in self._responses(prompts, settings, ordered=True, together=True):
            if response.error is not None:
                raise response.error
            assert response.generation is not None
            results.append(response.generation)
        return results

    def generate_many(
        self,
        prompts: "Iterable[Prompt | Request]",
        *,
        ordered: bool = False,
        **settings: Unpack[Settings],
    ) -> Iterator[Response]:
        """Continue any number of prompts, which are read as there is room for them.

        Each gets the tokens that it would get alone with its `ordinal`. Responses come as they end,
        or with `ordered` in the order of the prompts. A prompt that fails has its error in its
        response, and the others go on. Closing the iterator ends those under way.

        Settings of the call are checked before this returns; it raises what `generate` raises.
        """
        return self._responses(prompts, settings, ordered=ordered)

    def _responses(
        self,
        prompts: "Iterable[Prompt | Request]",
        settings: Settings,
        *,
        ordered: bool,
        together: bool = False,
    ) -> Iterator[Response]:
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list; for one prompt there is generate()")
        checked = check_settings(**settings)
        settings |= {  # of a request with others, which are checked once more
            "seed": checked.seed,
            "processors": checked.processors,
            "draft": checked.drafter,
            "observers": checked.observers,
            "stop": (*checked.stop, *checked.stop_conditions),
        }
        jobs = self._jobs(prompts, settings, checked)
        return respond(jobs, ordered=ordered, together=together)

    def _jobs(
        self, prompts: "Iterable[Prompt | Request]", settings: Settings, checked: CheckedSettings
    ) -> Iterator[Job]:
        """What continues each prompt. checked: the settings of the call."""
        for index, prompt in enumerate(prompts):
            request = prompt if isinstance(prompt, Request) else Request(prompt)
            ordinal = checked.ordinal + index if request.ordinal is None else request.ordinal
            try:
                own = dataclasses.replace(checked, ordinal=ordinal)
                if request.settings:
                    given = {**settings, "ordinal": ordinal, **request.settings}
                    own = check_settings(**given)
                stream = self._stream(request.prompt, own, request.messages)
                job = Job(index, request, rows=own.rows, run=stream.run)
            except GptkError as error:
                job = Job(index, request, error=error)
            yield job

    def _stream(
        self,
        prompt: Prompt,
        settings: CheckedSettings,
        messages: "Sequence[Message] | None" = None,
    ) -> Stream:
        tokenizer = self.tokenizer if settings.stop else self._tokenizer
        if messages is not None:
            from gptk.text.chat import encode_chat  # jinja2 is not needed before

            prompt = encode_chat(self.tokenizer, messages, None)
        return Stream(self.model, tokenizer, self.encode(prompt), settings)

    def stream(self, prompt: Prompt = "", **settings: Unpack[Settings]) -> Stream:
        """Continue one prompt and give the text as it comes, see Stream.

        Each piece read from the Stream takes one step of decoding. Settings and the prompt are
        checked before this returns; it raises what `generate` raises.
        """
        return self._stream(prompt, check_settings(**settings))

    async def agenerate(self, prompt: Prompt = "", **settings: Unpack[Settings]) -> Generation:
        """As generate, for asyncio: other tasks go on meanwhile. Cancelling the task ends it."""
        stream = self.stream(prompt, **settings)
        return await awaited(stream.run, rows=stream.rows)

    def astream(self, prompt: Prompt = "", **settings: Unpack[Settings]) -> AsyncIterator[str]:
        """As stream, for asyncio: `async for piece in lm.astream("Once")`."""
        return pieces(self.stream(prompt, **settings))

    def chat(
        self,
        messages: "Sequence[Message]",
        *,
        template: str | None = None,
        **settings: Unpack[Settings],
    ) -> Generation:
        """Reply to a conversation, such as `[{"role": "user", "content": "Hello"}]`.

        The model's chat template makes a prompt of it, or `template` (jinja2). The reply ends
        at the model's end-of-turn token. Raises PromptError if there is no template or it does
        not take the messages, and what `generate` raises.
        """
        stream = self.stream_chat(messages, template=template, **settings)
        for _ in stream:
            pass
        return stream.result

    def stream_chat(
        self,
        messages: "Sequence[Message]",
        *,
        template: str | None = None,
        **settings: Unpack[Settings],
    ) -> Stream:
        """As chat, and give the reply as it comes, see Stream."""
        from gptk.text.chat import encode_chat  # jinja2 is not needed before

        return self.stream(encode_chat(self.tokenizer, messages, template), **settings)

    def score(self, prompt: Prompt) -> Score:
        """The log-probability of each token of a text but the first, which may be BOS.

        Raises PromptError for a text of under two tokens or one longer than the window.
        """
        ids = self.encode(prompt)
        if len(ids) < 2:
            raise PromptError("a text needs at least two tokens to be scored")
        window = self.model.config.context_length
        if len(ids) > window:
            raise PromptError(f"the text has {len(ids)} tokens, the model's window {window}")
        return scoring.score(self.model, ids)

    def score_continuations(
        self, pairs: Iterable[tuple[Prompt, Prompt]]
    ) -> Iterator[ContinuationScore]:
        """The log-probabilities of continuations: each pair is a context and its continuation.

        The passes over many pairs are joined, with those of other calls, too; a context with
        several continuations is read once, and so is what contexts begin with alike. Scores come in
        the order of the pairs, which are taken some 65,000 tokens ahead. A text as a continuation
        gets no BOS; an empty text as a context is the model's start token.

        Raises PromptError, when it comes to it, for a pair that is longer than the window, to which
        the last token does not count, and what `encode` raises.
        """
        return scoring.score_continuations(self.model, map(self._encode_pair, pairs))

    def _encode_pair(self, pair: tuple[Prompt, Prompt]) -> tuple[list[int], list[int]]:
        context, new = pair
        if isinstance(new, str):
            new = self.tokenizer.encode_within(new)
        return check_pair(self.encode(context), new, self.model.config)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, checked; an empty text becomes the start token.

        Raises PromptError or TokenizerError.
        """
        ids = encode_text(prompt, self.tokenizer) if isinstance(prompt, str) else read_ids(prompt)
        check_vocabulary(ids, self.model.config)
        return ids

    def files_read(self) -> list[ReadFile]:
        """The files that the model was loaded from, as they were then; none if it was not loaded.

        A plug-in that loads a model returns them from its method of the same name.
        """
        return [] if self._origin is None else list(self._origin.files)

    def is_unchanged(self) -> bool:
        """Whether loading it again would read the same files, as far as sizes and times tell."""
        return self._origin is None or self._origin.is_unchanged()

    def to_dict(self) -> dict[str, Any]:
        """What the model is, as JSON has it: where it was loaded from, the SHA-256 of its files and
        its tokenizer (which reads the files once more), its configuration, dtype and device."""
        origin, model, tokenizer = self._origin, self.model, self._tokenizer
        config = model.config
        values: dict[str, Any] = {}
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            values = dataclasses.asdict(config)
        return {
            "source": self.source,
            "path": None if origin is None or origin.path is None else str(origin.path),
            "files": [read.to_dict() for read in self.files_read()],
            "class": type(model).__name__,
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantize": None if origin is None else origin.quantize,
            "device": str(model.device),
            "tokenizer": tokenizer
            and {"name": tokenizer.encoding.name, "sha256": fingerprint(tokenizer)},
        }

    def __repr__(self) -> str:
        model, config = self.model, self.model.config
        source = f"{shortened(self._origin.source)}, " if self._origin is not None else ""
        tokenizer = self._tokenizer.encoding.name if self._tokenizer is not None else "none"
        return (
            f"LanguageModel({source}{type(model).__name__} of {config.n_layers} layers, "
            f"{config.vocab_size:,} tokens, window {config.context_length:,}, "
            f"{str(model.dtype).removeprefix('torch.')} on {model.device}, tokenizer {tokenizer})"
        )

    def save(self, path: str | Path) -> None:
        """Write the model and its tokenizer as a gptk checkpoint, a directory.

        Raises SourceError for a model that is no gptk.GPT, or a path that cannot be written.
        """
        save_checkpoint(path, self.model, self._tokenizer)
