"""The decoding loop, once for every sampler: choose, end rows, move the session, repeat."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from gptk.errors import DecodingError, PluginError
from gptk.sampling import Choice, LogitsProcessor, Sampler
from gptk.session import DecodeSession, Follower
from gptk.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "time", "stuck", "interrupted"]
"""Why a row ended: end-of-text token, stop string, token limit or full window, time limit, no
token left by the processors, or the user's interrupt."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A row's new tokens, as a chain of links, so that beams share what they have in common."""

    prompt: int
    sample: int
    parent: "Hypothesis | None" = None
    token: int = -1
    logprob: float = 0.0
    score: float = 0.0
    length: int = 0
    tail: bytes = b""
    """The last bytes of the text, as many as a stop string may begin in."""
    reason: FinishReason | None = None

    def chain(self) -> "list[Hypothesis]":
        """The links from the first new token to this one."""
        links = []
        link: Hypothesis | None = self
        while link is not None and link.parent is not None:
            links.append(link)
            link = link.parent
        return links[::-1]


@dataclass(frozen=True)
class Limits:
    """What ends a row."""

    max_new_tokens: int
    eos: tuple[int, ...] = ()
    stop: tuple[bytes, ...] = ()
    deadline: float | None = None
    """In seconds of `time.monotonic`."""


@dataclass
class Search:
    """One prompt's results and what bounds them."""

    limit: int
    finished: list[Hypothesis] = field(default_factory=list)


class Decoding:
    """One run of a sampler over the rows of a session.

    Call `step` until `live` is empty; `results` can be asked for at any time.
    """

    def __init__(
        self,
        session: DecodeSession,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
        *,
        n: int,
        limits: Limits,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.session = session
        self.sampler = sampler
        self.limits = limits
        self.tokenizer = tokenizer
        self.n = n
        self.max_rows = sampler.max_rows(n)
        rows = session.rows
        rows.eos = limits.eos
        window = session.model.config.context_length
        samples = len(rows) // (max(rows.prompts) + 1)
        self.searches = [
            Search(
                limit=limits.max_new_tokens
                if session.overflow == "slide"
                else min(limits.max_new_tokens, window - length)
            )
            for length in rows.prompt_lengths[::samples]
        ]
        self.live = [
            Hypothesis(prompt=prompt, sample=row % samples)
            for row, prompt in enumerate(rows.prompts)
        ]
        """The hypotheses of the session's rows, in their order."""
        self.steps = 0
        self._processed: Tensor | None = None
        self._processes = []
        for processor in (*processors, *sampler.processors()):
            process = processor.start(rows)
            self._processes.append(process)
            if isinstance(process, Follower):
                session.follow(process)
            elif process is not processor and (
                verbs := [v for v in ("extend", "select", "rewind") if hasattr(process, v)]
            ):
                raise PluginError(
                    f"the state of processor {processor.name} has {' and '.join(verbs)}, but a "
                    "follower needs extend, select and rewind"
                )

    @torch.inference_mode()
    def step(self) -> None:
        """Extend every live row by the sampler's choice."""
        self.sampler.advance(self)
        self.steps += 1

    def processed_logits(self) -> Tensor:
        """The session's logits after all processors, (rows, vocab) float32."""
        logits = self.session.logits
        shape = logits.shape
        for process in self._processes:
            logits = process(logits, self.session.rows)
            if not isinstance(logits, Tensor) or logits.shape != shape:
                given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else logits
                raise PluginError(
                    f"processor {getattr(process, 'name', type(process).__name__)} returned "
                    f"{given}; it must return logits of shape {tuple(shape)}"
                )
        self._processed = logits
        return logits

    def commit(self, choice: Choice) -> None:
        """Make the choice: end the rows that end, and extend the session by the others."""
        self._check(choice)
        kept: list[list[tuple[int, Hypothesis]]] = [[] for _ in self.searches]
        ended: list[list[Hypothesis]] = [[] for _ in self.searches]
        ranks = [0] * len(self.searches)
        late = self.limits.deadline is not None and time.monotonic() >= self.limits.deadline
        for parent, token, logprob, score in zip(*_to_lists(choice), strict=True):
            row = self.live[parent]
            if score > -torch.inf:
                row = self._extended(row, token, logprob, score, late)
                if row.reason is None and len(kept[row.prompt]) < self.max_rows:
                    kept[row.prompt].append((parent, row))
                elif row.reason is not None and ranks[row.prompt] < self.max_rows:
                    ended[row.prompt].append(row)
                ranks[row.prompt] += 1
            elif not self.sampler.competing:
                ended[row.prompt].append(self._stuck(parent))
        finished = [
            search.finished + more for search, more in zip(self.searches, ended, strict=True)
        ]
        if self.sampler.competing:
            for parent, row in enumerate(self.live):
                if not ranks[row.prompt] and not finished[row.prompt]:
                    finished[row.prompt].append(self._stuck(parent))
            for prompt, rows in enumerate(kept):
                finished[prompt] = sorted(finished[prompt], key=self.rank, reverse=True)
                del finished[prompt][self.max_rows :]
                if rows and finished[prompt] and self._is_done(finished[prompt], rows[0][1]):
                    rows.clear()
        going_on = [pair for rows in kept for pair in rows]
        self.live = [row for _, row in going_on]
        for search, results in zip(self.searches, finished, strict=True):
            search.finished = results
        if self.live:
            session = self.session
            session.select([parent for parent, _ in going_on])
            device = session.logits.device
            session.rows.scores = torch.tensor([row.score for row in self.live], device=device)
            session.extend(torch.tensor([row.token for row in self.live], device=device))

    def results(self, prompt: int) -> list[Hypothesis]:
        """The n results of a prompt; rows still live count as interrupted.

        Competing rows come best first, others in the order of their sample index.
        """
        finished = self.searches[prompt].finished + [
            replace(row, reason="interrupted") for row in self.live if row.prompt == prompt
        ]
        if self.sampler.competing:
            return sorted(finished, key=self.rank, reverse=True)[: self.n]
        return sorted(finished, key=lambda row: row.sample)

    def rank(self, row: Hypothesis) -> float:
        """What the sampler ranks a hypothesis by."""
        return self.sampler.rank(row.score, row.length)

    def _extended(
        self, row: Hypothesis, token: int, logprob: float, score: float, late: bool
    ) -> Hypothesis:
        text = row.tail
        stopped = False
        limits = self.limits
        if limits.stop and self.tokenizer is not None:
            text += self.tokenizer.token_bytes(token)
            stopped = any(stop in text for stop in limits.stop)
            keep = max(map(len, limits.stop)) - 1
            text = text[len(text) - keep :] if len(text) > keep else text
        reason: FinishReason | None = None
        if token in limits.eos:
            reason = "eos"
        elif stopped:
            reason = "stop"
        elif row.length + 1 >= self.searches[row.prompt].limit:
            reason = "length"
        elif late:
            reason = "time"
        return Hypothesis(
            prompt=row.prompt,
            sample=row.sample,
            parent=row,
            token=token,
            logprob=logprob,
            score=score,
            length=row.length + 1,
            tail=text,
            reason=reason,
        )

    def _is_done(self, finished: Sequence[Hypothesis], best: Hypothesis) -> bool:
        ranks = [self.rank(row) for row in finished]
        limit = self.searches[best.prompt].limit
        return self.sampler.is_done(ranks, best.score, best.length, limit)

    def _check(self, choice: Choice) -> None:
        candidates = choice.tokens.shape
        shapes = {choice.logprobs.shape, choice.scores.shape, candidates}
        if choice.parents is not None:
            shapes.add(choice.parents.shape)
        if len(candidates) != 1 or len(shapes) > 1:
            raise PluginError(
                f"sampler {self.sampler.name} chose tensors of unlike shapes or of more than one "
                f"axis: {', '.join(str(tuple(shape)) for shape in shapes)}"
            )
        if not self.sampler.competing and candidates[0] != len(self.live):
            raise PluginError(
                f"sampler {self.sampler.name} chose {candidates[0]} tokens for {len(self.live)} "
                "rows; only competing rows may be dropped or forked"
            )

    def _stuck(self, parent: int) -> Hypothesis:
        """A row's end where no token is left. Raises DecodingError if that is not the reason."""
        logits = self.session.logits[parent] if self._processed is None else self._processed[parent]
        if bool(self.session.logits[parent].isnan().any()):
            raise DecodingError("the model's logits are not numbers; are its weights damaged?")
        if bool(logits.isnan().any()) or bool((logits == torch.inf).any()):
            raise DecodingError("after the logits processors the logits are not finite numbers")
        if bool((logits > -torch.inf).any()):
            raise DecodingError(
                f"sampler {self.sampler.name} chose a token that the processors had taken out"
            )
        return replace(self.live[parent], reason="stuck")


def _to_lists(choice: Choice) -> tuple[list[int], list[int], list[float], list[float]]:
    """parents, tokens, log-probabilities and scores on the host."""
    tokens = choice.tokens.tolist()
    parents = list(range(len(tokens))) if choice.parents is None else choice.parents.tolist()
    return parents, tokens, choice.logprobs.tolist(), choice.scores.tolist()
