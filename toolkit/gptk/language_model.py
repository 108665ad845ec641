"""The public face: load a model, then generate, stream and score."""

import dataclasses
import operator
import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

import torch

from gptk.decoding.drafters import make_drafter
from gptk.decoding.run import Acceptance, Decoding, Limits, StopCondition, check_draft
from gptk.decoding.text import TextStream, make_generation
from gptk.errors import (
    DecodingError,
    GptkError,
    OptionError,
    PluginError,
    PromptError,
    TokenizerError,
    suggest,
)
from gptk.hooks.drafting import Drafter
from gptk.hooks.observing import DecodingObserver
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.model.compiled import compile_step
from gptk.model.gpt import GPT
from gptk.model.levels import Precision
from gptk.model.protocol import evaluating
from gptk.model.quantization import check_device
from gptk.model.scoring import Score, token_logprobs
from gptk.plugins.blame import blaming
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.session.rows import Rows
from gptk.session.session import DecodeSession, Overflow
from gptk.system import collector
from gptk.system.devices import resolve_device, resolve_dtype
from gptk.text.tokenizer import Tokenizer
from gptk.weights.building import build_model
from gptk.weights.loading import default_source, load_checkpoint
from gptk.weights.saving import save_checkpoint
from gptk.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from gptk.text.chat import Message

Prompt = str | Sequence[int]
"""A text, or token ids."""


class Settings(TypedDict, total=False):
    """What can be said of a generation; the defaults are in brackets."""

    sampler: str | Sampler
    """A spec string or an instance [greedy]."""
    processors: Iterable[str | LogitsProcessor]
    """Logits processors, applied in order, before those of the sampler [none]."""
    max_new_tokens: int
    """For each prompt [64]."""
    n: int
    """How many results for each prompt; the others are in `.alternatives` [1]."""
    seed: int | None
    """Any integer; without, a new one, which the result reports."""
    stop: "str | StopCondition | Iterable[str | StopCondition]"
    """What ends the continuation, one or several: a text, or a function that is given a row's
    tokens after each new one, prompt first [none]."""
    draft: "str | Drafter | LanguageModel | None"
    """What guesses tokens ahead, for the same result sooner: a model, or a drafter such as
    lookup:ngram=3,tokens=8 [none]."""
    overflow: Overflow
    """When the model's window is full: stop or slide, see DecodeSession [stop]."""
    max_seconds: float | None
    """A limit on time."""
    ignore_eos: bool
    """Go on after the end of the text [False]."""
    use_cache: bool
    """Keep keys and values; without, the same results, slowly [True]."""
    observers: Iterable[str | DecodingObserver]
    """What sees every step, such as trace:path=steps.jsonl [none]."""


@collector.paused()
def load(
    source: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Precision | Literal["stored"] | None = None,
    compile: bool = False,
    tokenizer: "str | Tokenizer | None" = None,
) -> "LanguageModel":
    """Load a language model.

    source: `smollm2`, a path, a hub id or a loader spec; by default $GPTK_MODEL, else SmolLM2
    where it is installed. device: auto (cuda, mps or cpu) or a name. dtype: auto (bfloat16 on
    GPUs and for quantized weights, float32 on CPUs), float32, bfloat16 or float16. quantize: the
    precision of the linear layers' weights: int8, int4 (see GPT.quantize; on CUDA by torchao), or,
    on a CPU, stored, for matrices that a GGUF file has as Q4_0, Q4_1 or Q8_0, which else are
    expanded. compile: the step that decodes one row, on a CPU (half a minute or more the first
    time) or CUDA, see compile_step. tokenizer: instead of the model's own.

    Raises SourceError, TokenizerError, DeviceError or OptionError.
    """
    on = resolve_device(device)
    if quantize not in (None, "stored", *get_args(Precision)):
        raise OptionError(f"quantize is {quantize!r}; it must be int8, int4 or stored")
    if quantize is not None:
        check_device(quantize, on)
    numbers = resolve_dtype(dtype, on, quantized=quantize is not None)
    # Levels are small: what is to be expanded is so at once where it stays.
    checkpoint = load_checkpoint(str(source or default_source()), stored=True)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    elif tokenizer is None and checkpoint.tokenizer is not None:
        tokenizer = checkpoint.tokenizer()

    model = build_model(checkpoint, on, numbers, quantize=quantize, pack=True)
    return LanguageModel(compile_step(model) if compile else model, tokenizer)


class LanguageModel:
    """A GPT and its tokenizer. Without a tokenizer, prompts are token ids and texts are empty."""

    def __init__(self, model: GPT, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer

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
        return self.generate_batch([prompt], **settings)[0]

    def generate_batch(
        self, prompts: Sequence[Prompt], **settings: Unpack[Settings]
    ) -> list[Generation]:
        """Continue several prompts at once; each gets what it would get alone."""
        stream = self.stream_batch(prompts, **settings)
        for _ in stream:
            pass
        return stream.results

    def stream(self, prompt: Prompt = "", **settings: Unpack[Settings]) -> "Stream":
        """Continue one prompt and give the text as it comes, see Stream."""
        return self.stream_batch([prompt], **settings)

    def stream_batch(self, prompts: Sequence[Prompt], **settings: Unpack[Settings]) -> "Stream":
        """As generate_batch, with a step of decoding each time the Stream is asked for more."""
        return Stream(self, prompts, **settings)

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
    ) -> "Stream":
        """As chat, and give the reply as it comes, see Stream."""
        from gptk.text.chat import encode_chat  # jinja2 is not needed before

        return self.stream(encode_chat(self.tokenizer, messages, template), **settings)

    def score(self, prompt: Prompt) -> Score:
        """The log-probability of each token of a text but the first (after BOS, if it has one).

        Raises PromptError for a text of under two tokens or one longer than the window.
        """
        ids = self.encode(prompt)
        if len(ids) < 2:
            raise PromptError("a text needs at least two tokens to be scored")
        window = self.model.config.context_length
        if len(ids) > window:
            raise PromptError(f"the text has {len(ids)} tokens, the model's window {window}")
        with evaluating(self.model), torch.inference_mode():
            tokens = torch.tensor(ids, device=self.model.device)
            hidden = self.model(tokens[None, :-1])[0]
            logprobs = token_logprobs(self.model, hidden, tokens[1:])
        return Score(tokens=ids, token_logprobs=logprobs.tolist())

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, checked; those of an empty text are the start token's.

        Raises PromptError or TokenizerError.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids:
                start = self.tokenizer.start
                if start is None:
                    raise PromptError(
                        "the prompt is empty and the model has no token to begin with"
                    )
                ids = [start]
        else:
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError:
                raise PromptError(
                    f"a prompt is a text or a list of token ids, not {prompt!r:.80}"
                ) from None
            if not ids:
                raise PromptError("the prompt has no tokens")
        vocabulary = self.model.config.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                raise PromptError(f"token {token} is not in the model's vocabulary of {vocabulary}")
        return ids

    def save(self, path: str | Path) -> None:
        """Write the model and its tokenizer as a gptk checkpoint, a directory."""
        save_checkpoint(Path(path), self.model, self._tokenizer)


class Stream:
    """An iterator over pieces of text; when it ends, `.result` is the Generation.

    Pieces are whole characters and never show part of a stop string; joined they are
    `result.text`. Where text cannot be shown as it is made (`live` is False: results compete or
    are several) the pieces are empty, one a step, and the first prompt's best text comes last.
    Settings are checked at once, see Settings.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Prompt],
        *,
        sampler: str | Sampler = "greedy",
        processors: Iterable[str | LogitsProcessor] = (),
        max_new_tokens: int = 64,
        n: int = 1,
        seed: int | None = None,
        stop: str | StopCondition | Iterable[str | StopCondition] = (),
        draft: str | Drafter | LanguageModel | None = None,
        overflow: Overflow = "stop",
        max_seconds: float | None = None,
        ignore_eos: bool = False,
        use_cache: bool = True,
        observers: Iterable[str | DecodingObserver] = (),
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise OptionError(_unknown_setting(name))
        self._max_new_tokens = _whole("max_new_tokens", max_new_tokens, least=1)
        self._n = _whole("n", n, least=1)
        self._seed = secrets.randbits(32) if seed is None else _whole("seed", seed)
        if overflow not in get_args(Overflow):
            raise OptionError(f"overflow is {overflow!r}; it must be stop or slide")
        if max_seconds is not None and not (
            isinstance(max_seconds, int | float) and max_seconds >= 0
        ):
            raise OptionError(f"max_seconds is {max_seconds!r}; it must be a number, 0 or more")
        self._lm = lm
        self._sampler = create("sampler", sampler, Sampler)
        self._processors = [
            create("processor", one, LogitsProcessor)
            for one in _listed("processors", processors, LogitsProcessor)
        ]
        self._observers = [
            create("decoding-observer", one, DecodingObserver)
            for one in _listed("observers", observers, DecodingObserver)
        ]
        # Whatever does not go together is refused before any work.
        with blaming([self._sampler]):
            self._rows = self._sampler.max_rows(n)
        self._drafter = None if draft is None else make_drafter(draft)
        if self._drafter is not None:
            with blaming([self._sampler]):
                check_draft(self._sampler)
        stops = _listed("stop", [stop] if callable(stop) else stop, str)
        self._stop_conditions = tuple(one for one in stops if not isinstance(one, str))
        self._stop = [one for one in stops if isinstance(one, str)]
        for one in stops:
            _check_stop(one)
        self._tokenizer = lm.tokenizer if self._stop else lm._tokenizer
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list; for one prompt there is generate()")
        self._prompts = [lm.encode(prompt) for prompt in prompts]
        window = lm.model.config.context_length
        longest = max(map(len, self._prompts), default=0)
        if longest >= window and overflow == "stop":
            raise PromptError(
                f"the prompt has {longest} tokens and the model's window is {window}, prompt and "
                "new tokens together; shorten it, or use overflow slide to keep its end"
            )
        self._max_seconds = max_seconds
        self._overflow, self._use_cache = overflow, use_cache
        self._eos = () if ignore_eos or self._tokenizer is None else self._tokenizer.eos
        self._decoding: Decoding | None = None
        self._results: list[Generation] | None = None
        self._shown = ""
        self._pieces = self._decode()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def live(self) -> bool:
        """Whether text comes as it is made, not all at the end."""
        return len(self._prompts) == self._rows == 1 and not self._sampler.competing

    @property
    def acceptance(self) -> Acceptance | None:
        """With a draft, how many of its guesses there were and were right so far."""
        if self._drafter is None or self._decoding is None:
            return None
        return self._decoding.acceptance

    @property
    def draws(self) -> bool:
        """Whether the result depends on the seed."""
        return self._sampler.random

    @property
    def results(self) -> list[Generation]:
        """The result for each prompt. Raises GptkError before the end."""
        if self._results is None:
            raise GptkError("the stream has not ended; read it to its end, or interrupt() it")
        return self._results

    @property
    def result(self) -> Generation:
        """The result for the first prompt. Raises GptkError before the end."""
        if not self.results:
            raise GptkError("there was no prompt, and so there is no result")
        return self.results[0]

    def interrupt(self) -> str:
        """End now. Returns the text not shown yet; `.results` are the best so far.

        Raises DecodingError if there is nothing yet.
        """
        self._pieces.close()
        return self._finish()

    def _finish(self) -> str:
        if self._decoding is None:
            raise DecodingError("interrupted before the first token")
        if self._results is None:
            with blaming([self._sampler, *self._processors]):
                self._results = [
                    self._generation(self._decoding, index) for index in range(len(self._prompts))
                ]
        text = self._results[0].text
        rest = text[len(self._shown) :]
        self._shown = text
        return rest

    def _decode(self) -> Generator[str, None, None]:
        if not self._prompts:
            self._results = []
            return
        seconds = self._max_seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        with blaming([self._sampler]):
            groups = self._sampler.groups if self._sampler.competing else 1
            layers = self._sampler.hidden_layers(self._lm.model.config)
        session = DecodeSession(
            self._lm.model,
            self._prompts,
            samples=1 if self._sampler.competing else self._rows,
            groups=groups,
            layers=layers,
            seed=self._seed,
            capacity=max(map(len, self._prompts)) + self._max_new_tokens,
            overflow=self._overflow,
            use_cache=self._use_cache,
        )
        stop = tuple(text.encode() for text in self._stop)
        self._decoding = decoding = Decoding(
            session,
            self._sampler,
            self._processors,
            n=self._n,
            limits=Limits(self._max_new_tokens, self._eos, stop, self._stop_conditions, deadline),
            tokenizer=self._tokenizer,
            drafter=self._drafter,
            observers=self._observers,
        )
        text = TextStream(self._stop)
        read = 0
        try:
            while decoding.live:
                decoding.step()
                piece = ""
                if self.live and self._tokenizer is not None:
                    row = (decoding.live or decoding.searches[0].finished)[0]
                    for link in row.since(read):
                        if link.reason != "eos":
                            piece += text.push(self._tokenizer.token_bytes(link.token))
                    read = row.length
                    self._shown += piece
                yield piece
        finally:
            decoding.close()
        yield self._finish()

    def _generation(self, decoding: Decoding, index: int) -> Generation:
        made = [
            make_generation(
                row,
                score=decoding.rank(row),
                prompt=self._prompts[index],
                seed=self._seed,
                tokenizer=self._tokenizer,
                stop=self._stop,
                is_complete=lambda tokens: self._is_complete(tokens, decoding.session.rows),
            )
            for row in decoding.results(index)
        ]
        picked = self._sampler.pick(made, self._n)
        if not picked:
            raise PluginError(f"sampler {self._sampler.name} picked none of {len(made)} results")
        best, *others = picked
        return dataclasses.replace(best, alternatives=others)

    def _is_complete(self, tokens: list[int], rows: Rows) -> bool | None:
        """Whether everything that asks for a complete text has one; None if nothing asks."""
        answers = [one.is_complete(tokens, rows) for one in self._processors]
        asked = [answer for answer in answers if answer is not None]
        return all(asked) if asked else None


def _listed(name: str, given: Any, single: type) -> list[Any]:
    """A setting that is a list, or one thing that would stand in it, or None for none."""
    if given is None:
        return []
    if isinstance(given, str | single):
        return [given]
    if not isinstance(given, Iterable):
        what = (
            "a text, a function, or a list of these"
            if name == "stop"
            else "a list of specs or instances"
        )
        raise OptionError(f"{name} is {given!r:.80}; it must be {what}")
    return list(given)


def _unknown_setting(name: str) -> str:
    processor = name.replace("_", "-")
    if processor in provided("processor"):
        return f"there is no setting {name}; it is a processor: processors=['{processor}:…']"
    return f"there is no setting {name}; {suggest(name, Settings.__annotations__, what='settings')}"


def _whole(name: str, value: Any, *, least: int | None = None) -> int:
    """A setting that is a whole number, as an int; numpy's and torch's integers serve too."""
    try:
        number = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} is {value!r}; it must be a whole number") from None
    if least is not None and number < least:
        raise OptionError(f"{name} is {number}; it must be {least} or more")
    return number


def _check_stop(text: Any) -> None:
    if callable(text):
        return
    if not isinstance(text, str) or not text:
        raise OptionError(f"the stop string {text!r} is not a text of a character or more")
    if "\N{REPLACEMENT CHARACTER}" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise OptionError(f"the stop string {text!r} holds what no text of a model can hold")
