"""The decoding loop, once for every sampler: choose, end rows, move the session, repeat."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from gptk.errors import DecodingError, GptkError, IncompatibleError, PluginError
from gptk.hooks.base import Plugin
from gptk.hooks.choice import Choice
from gptk.hooks.drafting import Draft, Drafter
from gptk.hooks.observing import DecodingListener, DecodingObserver, DecodingStep
from gptk.hooks.results import FinishReason, Hypothesis
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.plugins.blame import blaming, not_of_a_plugin, warn_of_failure
from gptk.session.rows import Follower
from gptk.session.session import DecodeSession
from gptk.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptk.hooks.sampling import Process

StopCondition = Callable[[list[int]], bool]
"""Given a row's tokens, prompt first, whether it ends with the last of them."""


@dataclass(frozen=True)
class Limits:
    """What ends a row."""

    max_new_tokens: int
    eos: tuple[int, ...] = ()
    stop: tuple[bytes, ...] = ()
    conditions: tuple[StopCondition, ...] = ()
    deadline: float | None = None
    """In seconds of `time.monotonic`."""


@dataclass
class Search:
    """The results of one prompt, or of one group of its rows, and what bounds them."""

    limit: int
    finished: list[Hypothesis] = field(default_factory=list)


@dataclass
class Acceptance:
    """What became of a draft's guesses."""

    guessed: int = 0
    accepted: int = 0


class Decoding:
    """One run of a sampler over the rows of a session.

    Call `step` until `live` is empty, and in the end `close`; `results` can be asked for at any
    time, also after an error. With a draft, rows run ahead of each other: a row whose next token
    was not guessed waits until no row has logits left, and then the model reads all at once.
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
        drafter: Drafter | None = None,
        observers: Sequence[DecodingObserver] = (),
    ) -> None:
        self.session = session
        self.sampler = sampler
        self.processors: tuple[LogitsProcessor, ...] = ()
        """In the order they work in, the sampler's own last."""
        self.limits = limits
        self.tokenizer = tokenizer
        self._groups = sampler.groups if sampler.competing else 1
        self._places = sampler.max_rows(n) // self._groups
        rows = session.rows
        rows.eos, rows.tokenizer = limits.eos, tokenizer
        window = session.model.config.context_length
        copies = len(rows) // (max(rows.prompts) + 1)
        self.searches = [
            Search(
                limit=limits.max_new_tokens
                if session.overflow == "slide"
                else min(limits.max_new_tokens, window - length)
            )
            for length in rows.prompt_lengths[::copies]
            for _ in range(self._groups)
        ]
        """For each prompt, and each group of its rows."""
        self.live = [
            Hypothesis(
                prompt=prompt, group=group, sample=0 if self.sampler.competing else row % copies
            )
            for row, (prompt, group) in enumerate(zip(rows.prompts, rows.groups, strict=True))
        ]
        """The hypotheses of the session's rows, in their order."""
        self.steps = 0
        self.acceptance = Acceptance()
        self._processes: list[tuple[str, Process]] = []
        self.state: object = None
        """What the sampler remembers."""
        self._drafter = drafter
        self._draft: Draft | None = None
        self._offered = [0] * len(rows)
        """For each row how many guesses are still to be compared."""
        self._listeners: list[tuple[DecodingObserver, DecodingListener]] = []
        self._seen: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None
        """For listeners: logits before and after the processors, and what each took out."""
        self._stand = list(rows.lengths)
        """The lengths of the rows at the next choice."""
        self._choices = 0
        self._plugins: list[Plugin] = [sampler, *processors, *observers]
        self._plugins += [drafter] if drafter is not None else []
        with torch.inference_mode(), blaming(self._plugins):
            self.processors = (*processors, *sampler.processors())
            self._plugins += self.processors[len(processors) :]
            for processor in self.processors:
                process = processor.start(rows)
                if not callable(process):
                    raise PluginError(
                        f"processor {processor.name}: start() returned {process!r:.80}; it must "
                        "return what is called at each step"
                    )
                self._processes.append((processor.name, process))
                self._follow(process, f"the state of processor {processor.name}")
            self.state = sampler.start(self)
            self._follow(self.state, f"the state of sampler {sampler.name}")
            if drafter is not None:
                check_draft(sampler)
                self._draft = drafter.start(self)
                if not hasattr(self._draft, "propose"):
                    raise PluginError(
                        f"drafter {drafter.name}: start() returned {self._draft!r:.80}; it must "
                        "return an object with propose()"
                    )
                self._follow(self._draft, f"the state of drafter {drafter.name}")
                self._guess()
            try:
                for observer in observers:
                    self._start_observer(observer)
            except BaseException:
                self.close()
                raise

    @torch.inference_mode()
    def step(self) -> None:
        """Extend every live row by the sampler's choice; with a draft, at least one row.

        Raises PluginError that names the plug-in whose code failed.
        """
        before = self._choices
        with blaming(self._plugins):
            self.sampler.advance(self)
        if self._choices == before:
            raise PluginError(f"sampler {self.sampler.name} made no choice in a step")
        self.steps += 1

    def close(self) -> None:
        """Tell the observers that the run has ended."""
        for observer, listener in self._listeners:
            try:
                listener.close()
            except Exception as error:
                warn_of_failure(observer, error)
        self._listeners = []

    def processed_logits(self) -> Tensor:
        """The logits after all processors, (rows, vocab) float32."""
        return self.process(self.sampler.logits(self.session))

    def process(self, logits: Tensor) -> Tensor:
        """Any logits for the rows' next tokens after all processors. (rows, vocab) float32."""
        shape = logits.shape
        given = logits
        removed: dict[str, Tensor] = {}
        for name, process in self._processes:
            before = logits
            logits = process(logits, self.session.rows)
            if (
                not isinstance(logits, Tensor)
                or logits.shape != shape
                or not logits.is_floating_point()
            ):
                what = (
                    f"shape {tuple(logits.shape)} and type {logits.dtype}"
                    if isinstance(logits, Tensor)
                    else f"{logits!r:.80}"
                )
                raise PluginError(
                    f"processor {name} returned {what}; it must return logits of shape "
                    f"{tuple(shape)} and type float32"
                )
            if self._listeners:
                count = (logits.isneginf() & ~before.isneginf()).sum(dim=-1)
                removed[name] = removed[name] + count if name in removed else count
        # A strategy may look ahead, or ask again: what counts is where the rows stand.
        if self._listeners and self._seen is None and self.session.rows.lengths == self._stand:
            self._seen = given, logits, removed
        return logits

    def commit(self, choice: Choice, *, extended: bool = False) -> None:
        """Make the choice: end the rows that end, and extend the session by the others.

        extended: the session's rows have their tokens already, so that parent i is the row
        that ends with candidate i, and the rows need only be selected.
        """
        self._check(choice)
        candidates = _to_lists(choice)
        self._check_values(*candidates[:2])
        # A row that waits for the model has had its choice: this one was for show.
        known = self.session.known
        waiting = [not one for one in known] if self._draft is not None else [False] * len(known)
        kept: list[list[tuple[int, Hypothesis]]] = [[] for _ in self.searches]
        ended: list[list[Hypothesis]] = [[] for _ in self.searches]
        ranks = [0] * len(self.searches)
        shown: dict[int, int] = {}
        late = self.limits.deadline is not None and time.monotonic() >= self.limits.deadline
        origins = range(len(choice.tokens)) if extended else None
        outcomes: list[Hypothesis | None] = []
        for place, (parent, token, logprob, score) in enumerate(zip(*candidates, strict=True)):
            row = self.live[parent]
            search = self._search_of(row)
            source = parent if origins is None else place
            outcome = None
            if waiting[source]:
                shown[source] = token
                kept[search].append((source, row))
            elif score > -torch.inf and logprob == logprob:  # no NaN
                row = self._extended(row, source, token, logprob, score, late)
                if row.reason is None and len(kept[search]) < self._places:
                    kept[search].append((source, row))
                    outcome = row
                elif row.reason is not None and ranks[search] < self._places:
                    ended[search].append(row)
                    outcome = row
                ranks[search] += 1
            elif not self.sampler.competing:
                self._explain(parent, token)
            outcomes.append(outcome)
        if self._listeners:
            self._tell(choice, waiting, outcomes)
        finished = [
            search.finished + more for search, more in zip(self.searches, ended, strict=True)
        ]
        if self.sampler.competing:
            self._check_dead_ends(kept, finished)
            for index, rows in enumerate(kept):
                finished[index] = sorted(finished[index], key=self.rank, reverse=True)
                del finished[index][self._places :]
                if rows and finished[index]:
                    best = max((row for _, row in rows), key=lambda row: row.score)
                    if self._is_done(finished[index], best):
                        rows.clear()
        going_on = [pair for rows in kept for pair in rows]
        self.live = [row for _, row in going_on]
        for entry, results in zip(self.searches, finished, strict=True):
            entry.finished = results
        if self.live:
            sources = [source for source, _ in going_on]
            self._offered = [] if extended else [self._offered[source] for source in sources]
            self.session.select(sources)
            moving = self.session.rows
            device = moving.tokens.device
            moving.scores = torch.tensor([row.score for row in self.live], device=device)
            moving.logprobs = torch.tensor([row.total for row in self.live], device=device)
            if not extended:
                tokens = [shown.get(source, row.token) for source, row in going_on]
                self._move(torch.tensor(tokens, device=device), [s in shown for s in sources])
        self._stand = list(self.session.rows.lengths)
        self._choices += 1

    def guess(self, next_logits: Callable[[], Tensor], count: int) -> Tensor:
        """What the sampler would choose were the logits those of `next_logits`: (rows, count).

        For drafts. All followers move along with the guesses, and in the end back.
        """
        session = self.session
        guesses = []
        stand, self._stand = self._stand, []  # no listener is to take these for the model's logits
        for _ in range(count):
            choice = self.sampler.step(self.process(next_logits()), session.rows)
            self._check(choice)
            guesses.append(choice.tokens)
            session.move(choice.tokens)
        session.rewind(count)
        self._stand = stand
        return torch.stack(guesses, dim=1)

    def results(self, prompt: int) -> list[Hypothesis]:
        """The results of a prompt; rows still live count as interrupted.

        Competing rows come best first, others in the order of their sample index.
        """
        finished = [
            row
            for search in self.searches[prompt * self._groups : (prompt + 1) * self._groups]
            for row in search.finished
        ] + [replace(row, reason="interrupted") for row in self.live if row.prompt == prompt]
        if self.sampler.competing:
            return sorted(finished, key=self.rank, reverse=True)
        return sorted(finished, key=lambda row: row.sample)

    def rank(self, row: Hypothesis) -> float:
        """What the sampler ranks a hypothesis by."""
        return self.sampler.rank(row.score, row.length)

    def _start_observer(self, observer: DecodingObserver) -> None:
        """What gptk raises on purpose, such as for a file that cannot be written, comes through."""
        try:
            self._listeners.append((observer, observer.start(self)))
        except GptkError:
            raise
        except Exception as error:
            warn_of_failure(observer, error)

    def _follow(self, state: object, whose: str) -> None:
        if isinstance(state, Follower):
            self.session.follow(state)
        elif verbs := [v for v in ("extend", "select", "rewind") if hasattr(state, v)]:
            raise PluginError(
                f"{whose} has {' and '.join(verbs)}, but a follower needs extend, select and rewind"
            )

    def _tell(
        self, choice: Choice, waiting: list[bool], outcomes: Sequence[Hypothesis | None]
    ) -> None:
        """Tell the listeners of a choice; one that fails hears no more."""
        if self._seen is None:  # the sampler chose without the processors
            logits = self.session.logits
            self._seen = logits, logits, {}
        logits, processed, removed = self._seen
        step = DecodingStep(
            number=self.steps,
            rows=tuple(self.live),
            waiting=waiting[: len(self.live)],
            logits=logits,
            processed=processed,
            removed=removed,
            choice=choice,
            outcomes=outcomes,
        )
        self._seen = None
        for entry in list(self._listeners):
            try:
                entry[1].step(step)
            except Exception as error:
                self._listeners.remove(entry)
                warn_of_failure(entry[0], error)

    def _search_of(self, row: Hypothesis) -> int:
        return row.prompt * self._groups + row.group

    def _move(self, tokens: Tensor, waiting: list[bool]) -> None:
        """Move the rows, but for those that wait, and run the model when none has logits left."""
        session = self.session
        if self._draft is None:
            session.extend(tokens)
            return
        session.move(tokens)
        if any(waiting):
            session.rewind([int(wait) for wait in waiting])
        known = session.known
        for row, (offered, as_guessed) in enumerate(zip(self._offered, known, strict=True)):
            self.acceptance.accepted += bool(offered and as_guessed)
            self._offered[row] = max(offered - 1, 0)
        if not any(known):
            self._guess()

    def _guess(self) -> None:
        """Let the draft guess and the model read the guesses, together with what is unread."""
        assert self._draft is not None
        session, rows = self.session, self.session.rows
        left = [self.searches[self._search_of(row)].limit - row.length - 1 for row in self.live]
        room = min(max(left), session.model.config.context_length - max(rows.lengths))
        guesses = self._draft.propose(self, room) if room > 0 else None
        if guesses is not None:
            self._check_guesses(guesses, room)
            self._offered = (guesses >= 0).sum(dim=1).tolist()
            self.acceptance.guessed += sum(self._offered)
            guesses = guesses.clamp(min=0)  # what stands where there is no guess is as good as any
        session.read(guesses)

    def _extended(
        self, row: Hypothesis, place: int, token: int, logprob: float, score: float, late: bool
    ) -> Hypothesis:
        text = row.tail
        stopped = False
        limits = self.limits
        if limits.stop and self.tokenizer is not None:
            text += self.tokenizer.token_bytes(token)
            stopped = any(stop in text for stop in limits.stop)
            keep = max(map(len, limits.stop)) - 1
            text = text[len(text) - keep :] if len(text) > keep else text
        if limits.conditions and not stopped:
            rows = self.session.rows
            tokens = [
                *rows.tokens[place, : rows.prompt_lengths[place] + row.length].tolist(),
                token,
            ]
            with not_of_a_plugin():
                stopped = any(condition(tokens) for condition in limits.conditions)
        reason: FinishReason | None = None
        if token in limits.eos:
            reason = "eos"
        elif stopped:
            reason = "stop"
        elif row.length + 1 >= self.searches[self._search_of(row)].limit:
            reason = "length"
        elif late:
            reason = "time"
        return Hypothesis(
            prompt=row.prompt,
            sample=row.sample,
            group=row.group,
            parent=row,
            token=token,
            logprob=logprob,
            total=row.total + logprob,
            score=score,
            length=row.length + 1,
            tail=text,
            reason=reason,
        )

    def _is_done(self, finished: Sequence[Hypothesis], best: Hypothesis) -> bool:
        ranks = [self.rank(row) for row in finished]
        limit = self.searches[self._search_of(best)].limit
        return self.sampler.is_done(ranks, best.score, best.length, limit)

    def _check(self, choice: object) -> None:
        """Raises PluginError for what is no choice for these rows. It does not wait for a GPU."""
        if not isinstance(choice, Choice):
            raise PluginError(
                f"sampler {self.sampler.name} returned {choice!r:.80}; it must return a gptk.Choice"
            )
        for what, tensor in vars(choice).items():
            if not isinstance(tensor, Tensor) and not (what == "parents" and tensor is None):
                raise PluginError(
                    f"sampler {self.sampler.name} chose {what} of type {type(tensor).__name__}; "
                    "they must be tensors"
                )
        for what, tensor in (("tokens", choice.tokens), ("parents", choice.parents)):
            if tensor is not None and not _holds_integers(tensor):
                raise PluginError(
                    f"sampler {self.sampler.name} chose {what} of type {tensor.dtype}; they must "
                    "be whole numbers"
                )
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

    def _check_values(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        vocabulary, rows = self.session.model.config.vocab_size, len(self.live)
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < vocabulary:
                raise PluginError(
                    f"sampler {self.sampler.name} chose token {token}; the vocabulary has "
                    f"{vocabulary}"
                )
        for parent in (min(parents, default=0), max(parents, default=0)):
            if not 0 <= parent < rows:
                raise PluginError(f"sampler {self.sampler.name} chose for row {parent} of {rows}")

    def _check_guesses(self, guesses: object, most: int) -> None:
        who = "the draft" if self._drafter is None else f"drafter {self._drafter.name}"
        if not isinstance(guesses, Tensor):
            raise PluginError(f"{who} guessed {guesses!r:.80}; it must give a tensor")
        rows = len(self.live)
        if guesses.dim() != 2 or len(guesses) != rows or not _holds_integers(guesses):
            raise PluginError(
                f"{who} gave guesses of shape {tuple(guesses.shape)} and type {guesses.dtype}; "
                f"they must be whole numbers of shape ({rows}, at most {most})"
            )
        if guesses.shape[1] > most:
            raise PluginError(
                f"{who} guessed {guesses.shape[1]} tokens ahead where {most} were asked for"
            )
        vocabulary = self.session.model.config.vocab_size
        wrong = guesses[(guesses < -1) | (guesses >= vocabulary)].tolist()
        if wrong:
            raise PluginError(f"{who} guessed token {wrong[0]}; the vocabulary has {vocabulary}")

    def _check_dead_ends(
        self, kept: Sequence[Sequence[object]], finished: Sequence[Sequence[object]]
    ) -> None:
        """Raises DecodingError where all rows of a prompt are at a dead end, with no result."""
        for place, row in enumerate(self.live):
            first = row.prompt * self._groups
            searches = range(first, first + self._groups)
            if not any(kept[search] or finished[search] for search in searches):
                self._explain(place)

    def _explain(self, place: int, token: int = 0) -> NoReturn:
        """Raises DecodingError that names who left no token to a row, or made it no number."""
        row = self.live[place]
        where = f"after {row.length} new tokens"
        if len(self.searches) > self._groups:
            where += f" of prompt {row.prompt + 1}"
        logits = self.sampler.logits(self.session)
        if not _is_distribution(logits[place]):
            raise DecodingError("the model's logits are not numbers; are its weights damaged?")
        for name, process in self._processes:
            logits = process(logits, self.session.rows)
            if bool((logits[place] == -torch.inf).all()):
                raise DecodingError(f"processor {name} left no token to choose from {where}")
            if not _is_distribution(logits[place]):
                raise DecodingError(f"processor {name} gave logits that are not numbers {where}")
        if bool(logits[place, token] == -torch.inf):
            what = "chose a token that the processors had taken out"
        else:
            what = "gave its token a score or log-probability that is no number"
        raise DecodingError(f"sampler {self.sampler.name} {what} {where}")


def check_draft(sampler: Sampler) -> None:
    """Raises IncompatibleError if speculation has no meaning for a sampler."""
    if reason := sampler.refuses_draft():
        raise IncompatibleError(f"sampler {sampler.name} does not go with a draft: {reason}")


def _is_distribution(logits: Tensor) -> bool:
    """Whether softmax gives probabilities. logits: (vocab,)."""
    return bool(logits.amax().isfinite())  # NaN is the largest


def _holds_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _to_lists(choice: Choice) -> tuple[list[int], list[int], list[float], list[float]]:
    """parents, tokens, log-probabilities and scores on the host."""
    tokens = choice.tokens.tolist()
    parents = list(range(len(tokens))) if choice.parents is None else choice.parents.tolist()
    return parents, tokens, choice.logprobs.tolist(), choice.scores.tolist()
