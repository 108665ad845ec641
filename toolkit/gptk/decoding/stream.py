"""A generation while it is decoded: pieces of text, and in the end the results."""

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence

from gptk.decoding.limits import Limits
from gptk.decoding.prompts import check_lengths
from gptk.decoding.run import Decoding
from gptk.decoding.settings import CheckedSettings
from gptk.decoding.speculation import Acceptance
from gptk.decoding.text import TextStream, make_generation
from gptk.errors import DecodingError, GptkError, PluginError
from gptk.hooks.results import Generation
from gptk.hooks.sampling import Sampler
from gptk.model.protocol import CausalModel
from gptk.plugins.blame import blaming
from gptk.session.rows import Rows
from gptk.session.session import DecodeSession
from gptk.text.tokenizer import Tokenizer


class Stream:
    """An iterator over pieces of text; when it ends, `.result` is the Generation.

    Pieces are whole characters and never show part of a stop string; joined they are
    `result.text`. Where text cannot be shown while it is decoded (`live` is False: rows compete, or
    there are several results) each step's piece is empty, and the text of the first prompt's best
    result comes last.

    prompts: token ids. tokenizer: without one, texts are empty. Raises PromptError for a prompt
    that fills the model's window.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Sequence[int]],
        settings: CheckedSettings,
    ) -> None:
        check_lengths(prompts, model.config, settings.overflow)
        self._model, self._tokenizer = model, tokenizer
        self._prompts, self._settings = prompts, settings
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
        """Whether pieces of text come during decoding, and not all at the end."""
        return len(self._prompts) == self._settings.rows == 1 and not self._sampler.competing

    @property
    def acceptance(self) -> Acceptance | None:
        """With a draft, how many tokens it has guessed, and how many of them were accepted."""
        return None if self._decoding is None else self._decoding.acceptance

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

        Raises DecodingError if decoding has not started.
        """
        self._pieces.close()
        return self._finish()

    @property
    def _sampler(self) -> Sampler:
        return self._settings.sampler

    def _decode(self) -> Generator[str, None, None]:
        if not self._prompts:
            self._results = []
            return
        self._decoding = decoding = self._start()
        text = TextStream(self._settings.stop)
        read = 0
        try:
            while decoding.live:
                decoding.step()
                piece = ""
                if self.live and self._tokenizer is not None:
                    row = decoding.live[0] if decoding.live else decoding.results(0)[0]
                    for link in row.since(read):
                        if link.reason != "eos":
                            piece += text.push(self._tokenizer.token_bytes(link.token))
                    read = row.length
                    self._shown += piece
                yield piece
        finally:
            decoding.close()
        yield self._finish()

    def _start(self) -> Decoding:
        """Read the prompts into a new session, and start a run over its rows."""
        settings, sampler, model = self._settings, self._sampler, self._model
        seconds = settings.max_seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        with blaming([sampler]):
            groups, layers = settings.groups, sampler.hidden_layers(model.config)
        session = DecodeSession(
            model,
            self._prompts,
            samples=1 if sampler.competing else settings.rows,
            groups=groups,
            layers=layers,
            seed=settings.seed,
            capacity=max(map(len, self._prompts)) + settings.max_new_tokens,
            overflow=settings.overflow,
            use_cache=settings.use_cache,
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
        )

    def _finish(self) -> str:
        """Make the results. Returns the text of the first that was not shown yet."""
        if self._decoding is None:
            raise DecodingError("interrupted before the first token")
        if self._results is None:
            with blaming([self._sampler, *self._settings.processors]):
                self._results = [
                    self._generation(self._decoding, index) for index in range(len(self._prompts))
                ]
        text = self._results[0].text
        rest = text[len(self._shown) :]
        self._shown = text
        return rest

    def _generation(self, decoding: Decoding, index: int) -> Generation:
        """The result of a prompt, with its alternatives."""
        results = [
            make_generation(
                row,
                score=decoding.rank(row),
                prompt=self._prompts[index],
                seed=self._settings.seed,
                tokenizer=self._tokenizer,
                stop=self._settings.stop,
                is_complete=lambda tokens: self._is_complete(tokens, decoding.session.rows),
            )
            for row in decoding.results(index)
        ]
        picked = self._sampler.pick(results, self._settings.n)
        if not picked:
            raise PluginError(f"sampler {self._sampler.name} picked none of {len(results)} results")
        best, *others = picked
        return dataclasses.replace(best, alternatives=others)

    def _is_complete(self, tokens: list[int], rows: Rows) -> bool | None:
        """Whether the text satisfies every processor that asks for something; None if none asks."""
        answers = [processor.is_complete(tokens, rows) for processor in self._settings.processors]
        asked = [answer for answer in answers if answer is not None]
        return all(asked) if asked else None
