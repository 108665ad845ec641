"""A generation while it is decoded: pieces of text, tokens, and in the end the result."""

import dataclasses
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gptk.decoding.checks import check_layers
from gptk.decoding.limits import Limits
from gptk.decoding.live_text import LiveText
from gptk.decoding.prompts import check_length
from gptk.decoding.run import Decoding
from gptk.decoding.settings import CheckedSettings
from gptk.decoding.speculation import Acceptance
from gptk.decoding.text import make_generation
from gptk.engine.engine import ENGINE
from gptk.errors import DecodingError, GptkError, PluginError, brief
from gptk.hooks.results import Generation, TopTokens
from gptk.hooks.sampling import Sampler
from gptk.model.protocol import CausalModel
from gptk.plugins.blame import blaming
from gptk.plugins.registry import PluginWarning
from gptk.session.rows import Rows
from gptk.session.session import DecodeSession
from gptk.system.memory import explaining_out_of_memory
from gptk.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class StreamedToken:
    """A new token of a stream, see Stream.tokens."""

    token: int
    logprob: float
    """After all processors."""
    text: str
    """What it adds to the text; empty if it ends within a character."""
    top_logprobs: TopTokens | None = None
    """With the setting `top_logprobs`, the likeliest tokens at its step."""


class Stream:
    """An iterator over pieces of text; when it ends, `.result` is the Generation.

    Pieces are whole characters and never show part of a stop string; joined they are
    `result.text`. Where text cannot be shown while it is decoded (`live` is False: rows compete, or
    there are several results) each step's piece is empty, and the text of the best result comes
    last. `tokens()` gives token ids and log-probabilities with the pieces.

    In a `with` statement, leaving the block ends it and frees its memory; `.result` is then the
    best so far, if there is a token. Any thread may read it or `interrupt()` it.

    prompt: token ids. tokenizer: without one, texts are empty. Raises PromptError for a prompt that
    fills the model's window.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        settings: CheckedSettings,
    ) -> None:
        check_length(prompt, model.config, settings.overflow)
        self._model, self._tokenizer = model, tokenizer
        self.settings = settings
        """The settings in effect, with the seed that was chosen."""
        self._prompt = prompt
        self._decoding: Decoding | None = None
        """None before the first step, and once there is a result."""
        self._acceptance: Acceptance | None = None
        self._result: Generation | None = None
        self._text = LiveText(tokenizer, settings.stop)
        self._ended = False
        self._stepping = False
        self._interrupted = False
        self._lock = threading.RLock()
        """Held during a step, and while the result is made."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._take(self._step)
        if piece is None:
            raise StopIteration
        return piece

    def run(self) -> Generation:
        """Decode to the end."""
        try:
            while self._take(self._step_without_text) is not None:
                pass
        finally:
            self._forget()
        return self.result

    def _take(self, step: Callable[[], str]) -> str | None:
        """Take a step in a run of the engine. Returns what it returns; None once the stream has
        ended."""
        if self._stepping and ENGINE.is_inside:
            raise GptkError("a stream cannot be read by what its own steps call")
        with self._lock:
            if self._ended:
                return None
            self._stepping = True
            try:
                with explaining_out_of_memory(self._what(), _LESS):
                    return ENGINE.call(step, rows=self.settings.rows)
            except BaseException:
                self._end()
                raise
            finally:
                self._stepping = False

    def _forget(self) -> None:
        """Let go the session and its memory."""
        if self._decoding is not None:
            self._decoding.session.release()
            self._decoding = None

    def tokens(self) -> Iterator[StreamedToken]:
        """The tokens of the result, each with its log-probability and what it adds to the
        text, as soon as they are certain; in the end they are `result.tokens`.

        A token is held back while its text may be the beginning of a stop string, and all are where
        `live` is False. Reads the stream: use this instead of iterating over it.
        """
        for _ in self:
            yield from self._new_tokens()
        yield from self._new_tokens()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _traceback: object) -> None:
        """End the stream. Raises GptkError if a plug-in fails to give the result, but none in place
        of the block's own error."""
        if self._stepping and ENGINE.is_inside:
            self._interrupted = True
            return
        with self._lock:
            try:
                self._end()
                if self._decoding is not None:
                    self._finish()
            except GptkError:
                if error is None:
                    raise
            finally:
                self._forget()

    @property
    def live(self) -> bool:
        """Whether pieces of text come during decoding, and not all at the end."""
        return self.settings.rows == 1 and not self._sampler.competing

    @property
    def rows(self) -> int:
        """The most rows that it decodes at the same time."""
        return self.settings.rows

    @property
    def acceptance(self) -> Acceptance | None:
        """With a draft, how many tokens it has guessed, and how many of them were accepted."""
        decoding = self._decoding
        return self._acceptance if decoding is None else decoding.acceptance

    @property
    def draws(self) -> bool:
        """Whether the result depends on the seed."""
        return self._sampler.random

    @property
    def result(self) -> Generation:
        """The best result, with its alternatives. Raises GptkError before the end, or if it was
        ended before its first token."""
        if self._result is None and self._ended and self._decoding is None:
            raise GptkError("the stream was ended before its first token, and has no result")
        if self._result is None:
            raise GptkError("the stream has not ended; read it to its end, or interrupt() it")
        return self._result

    def interrupt(self) -> str:
        """End now. Returns the text not shown yet; `.result` is the best so far.

        From another thread it waits for the step under way. Called by what a step calls, such as an
        observer, it returns an empty text, and the stream ends after that step.
        Raises DecodingError if decoding has not started.
        """
        self._interrupted = True  # so that a thread that reads on ends after its step
        if self._stepping and ENGINE.is_inside:
            return ""
        with self._lock:
            self._end()
            return self._finish()

    @property
    def _sampler(self) -> Sampler:
        return self.settings.sampler

    def _step(self) -> str:
        """Take a step of decoding, or end. Returns the new piece of text."""
        rest = self._step_without_text()
        decoding = self._decoding
        if decoding is None or not self.live:
            return rest
        return self._text.add(decoding.live[0] if decoding.live else decoding.results(0)[0])

    def _step_without_text(self) -> str:
        """Take a step of decoding, or end. Returns the rest of the text once it ends."""
        if self._decoding is None:
            self._decoding = self._start()
        if self._interrupted or not self._decoding.live:
            self._end()
            return self._finish()
        self._decoding.step()
        return ""

    def _what(self) -> str:
        """What is decoded, for messages."""
        rows = self.settings.rows
        return f"decoding a prompt with {rows:,} rows" if rows > 1 else "decoding a prompt"

    def _new_tokens(self) -> Iterator[StreamedToken]:
        for token, logprob, text, top in self._text.take():
            yield StreamedToken(token, logprob, text, top)

    def _end(self) -> None:
        """Take no further step."""
        self._ended = True
        if self._decoding is not None:
            self._decoding.close()

    def _start(self) -> Decoding:
        """Read the prompt into a new session, and start a run over its rows."""
        settings, sampler, model = self.settings, self._sampler, self._model
        seconds = settings.max_seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        with blaming([sampler]):
            groups = settings.groups
            asked = sampler.hidden_layers(model.config)
            layers = check_layers(asked, sampler, model.config.n_layers)
        session = DecodeSession(
            model,
            [self._prompt],
            samples=1 if sampler.competing else settings.rows,
            groups=groups,
            layers=layers,
            seed=settings.seed,
            capacity=self._capacity(),
            overflow=settings.overflow,
            use_cache=settings.use_cache,
            ordinals=[settings.ordinal],
        )
        eos = () if self._tokenizer is None or settings.ignore_eos else self._tokenizer.eos
        limits = Limits(
            max_new_tokens=settings.max_new_tokens,
            eos=eos,
            stop=tuple(text.encode() for text in settings.stop),
            conditions=settings.stop_conditions,
            deadline=deadline,
        )
        return Decoding(
            session,
            sampler,
            settings.processors,
            n=settings.n,
            limits=limits,
            tokenizer=self._tokenizer,
            drafter=settings.drafter,
            observers=settings.observers,
            top_logprobs=settings.top_logprobs,
        )

    def _capacity(self) -> int:
        """The tokens of a row for which memory is reserved at the start; for more it grows."""
        reserved = max(_RESERVED // self.settings.rows, _RESERVED_FOR_MANY)
        return len(self._prompt) + min(self.settings.max_new_tokens, reserved)

    def _finish(self) -> str:
        """Make the result and free the session. Returns its text that was not shown yet."""
        if self._result is None:
            if self._decoding is None:
                raise DecodingError("interrupted before the first token")
            with blaming([self._sampler, *self.settings.processors]):
                self._result = self._generation(self._decoding)
            self._acceptance = self._decoding.acceptance
            self._forget()
        return self._text.finish(self._result)

    def _generation(self, decoding: Decoding) -> Generation:
        """The best result, with its alternatives."""
        results = [
            make_generation(
                row,
                score=decoding.rank(row),
                prompt=self._prompt,
                seed=self.settings.seed,
                ordinal=self.settings.ordinal,
                tokenizer=self._tokenizer,
                stop=self.settings.stop,
                top_logprobs=bool(self.settings.top_logprobs),
                is_complete=lambda tokens: self._is_complete(tokens, decoding.session.rows),
                parse=self._parse,
            )
            for row in decoding.results(0)
        ]
        picked = self._sampler.pick(results, self.settings.n)
        if not picked:
            raise PluginError(f"sampler {self._sampler.name} picked none of {len(results)} results")
        best, *others = picked
        return dataclasses.replace(best, alternatives=others)

    def _is_complete(self, tokens: list[int], rows: Rows) -> bool | None:
        """Whether the text satisfies every processor that asks for something; None if none asks."""
        answers = [processor.is_complete(tokens, rows) for processor in self.settings.processors]
        asked = [answer for answer in answers if answer is not None]
        return all(asked) if asked else None

    def _parse(self, text: str) -> object:
        """What the first processor that can read a complete text makes of it, or None.

        A text that it cannot read is told in a warning, so that the other results are not lost.
        """
        for processor in self.settings.processors:
            try:
                parsed = processor.parse(text)
            except (GptkError, ValueError) as error:  # pydantic's validation error is a ValueError
                line = f"processor {processor.name} cannot read its text: {brief(error)}"
                warnings.warn(line, PluginWarning, stacklevel=2)
                return None
            if parsed is not None:
                return parsed
        return None


_LESS = "ask for fewer results or beams, or for fewer new tokens"

_RESERVED, _RESERVED_FOR_MANY = 1024, 64
"""New tokens for which memory is reserved at the start: of a single row, of each of many rows."""
