"""The decoding loop, once for every sampler: choose, end rows, move the session, repeat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptk.decoding.checks import check_choice, check_draft, check_values
from gptk.decoding.limits import Extender, Limits
from gptk.decoding.listeners import Listeners
from gptk.decoding.observed import ChoiceLogits, Observed
from gptk.decoding.processing import Processing
from gptk.decoding.searches import GoingOn, Searches
from gptk.decoding.speculation import Acceptance, Speculation
from gptk.errors import PluginError
from gptk.hooks.base import Plugin
from gptk.hooks.choice import Choice
from gptk.hooks.drafting import Drafter
from gptk.hooks.observing import DecodingObserver, DecodingStep
from gptk.hooks.results import Hypothesis
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.model.protocol import inferring
from gptk.plugins.blame import blaming
from gptk.plugins.returned import check_state
from gptk.session.rows import Follower
from gptk.session.session import DecodeSession
from gptk.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidates:
    """A choice's candidates, sorted by what becomes of them."""

    kept: list[list[GoingOn]]
    """For each search the rows that can go on."""
    ended: list[list[Hypothesis]]
    """For each search the rows that end with this choice."""
    outcomes: list[Hypothesis | None]
    """For each candidate the row that it makes; None if it is not taken."""
    placeholders: dict[int, int]
    """For each waiting row, by index, the token chosen for it, which is to be discarded."""


class Decoding:
    """One run of a sampler over the rows of a session. It fulfils the protocol `gptk.Run`.

    Call `step` until `live` is empty, and in the end `close`. `results` may be called at any time,
    also after an error. With a draft, rows run ahead of each other, see Speculation.
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
        top_logprobs: int = 0,
    ) -> None:
        """top_logprobs: how many of the likeliest tokens each link of a result has in `top`."""
        self.session = session
        self.sampler = sampler
        self.processors: tuple[LogitsProcessor, ...] = ()
        """In the order they work in, the sampler's own last."""
        self.tokenizer = tokenizer
        self.steps = 0
        self.state: object = None
        """What the sampler's `start` returned."""
        rows = session.rows
        rows.set_tokenizer(tokenizer, limits.eos)
        copies = len(rows) // (max(rows.prompts) + 1)
        self.limits = limits
        self._searches = Searches(sampler, session, limits, n=n, copies=copies)
        self._extender = Extender(session, limits, tokenizer)
        self.live = [
            Hypothesis(prompt=prompt, group=group, sample=0 if sampler.competing else row % copies)
            for row, (prompt, group) in enumerate(zip(rows.prompts, rows.groups, strict=True))
        ]
        """The hypotheses of the session's rows, in their order."""
        self._listeners = Listeners()
        self._observed = Observed(rows.lengths)
        self._top_logprobs = top_logprobs
        self._speculation: Speculation | None = None
        self._choices = 0
        self._plugins: list[Plugin] = [sampler, *processors, *observers]
        self._plugins += [drafter] if drafter is not None else []
        with torch.inference_mode(), blaming(self._plugins):
            self._start(processors, drafter, observers)

    def _start(
        self,
        processors: Sequence[LogitsProcessor],
        drafter: Drafter | None,
        observers: Sequence[DecodingObserver],
    ) -> None:
        self.processors = (*processors, *self.sampler.processors())
        self._plugins += self.processors[len(processors) :]
        self._processing = Processing(self.session.rows, self.processors)
        for name, process in self._processing.started:
            self._follow(process, f"the state of processor {name}")
        self.state = self.sampler.start(self)
        self._follow(self.state, f"the state of sampler {self.sampler.name}")
        if drafter is not None:
            check_draft(self.sampler)
            self._speculation = Speculation(drafter, self)
            self._follow(self._speculation.draft, f"the state of drafter {drafter.name}")
            self._guess()
        self._listeners.start(self, observers)

    @inferring
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
        self._listeners.close()

    @property
    def acceptance(self) -> Acceptance | None:
        """With a draft, how many tokens it has guessed, and how many of them were accepted."""
        return None if self._speculation is None else self._speculation.acceptance

    def results(self, prompt: int) -> list[Hypothesis]:
        """The results of a prompt; its rows that are still live count as interrupted.

        Competing rows come best first, others in the order of their sample index.
        """
        return self._searches.results(prompt, self.live)

    def rank(self, row: Hypothesis) -> float:
        """What the sampler ranks a hypothesis by."""
        return self._searches.rank(row)

    def processed_logits(self) -> Tensor:
        """The logits after all processors, (rows, vocab) float32."""
        return self.process(self.sampler.logits(self.session))

    def process(self, logits: Tensor) -> Tensor:
        """What all processors make of other logits for the rows' next tokens, (rows, vocab)."""
        if not self._watched:
            return self._processing(logits)
        removed: dict[str, Tensor] = {}
        processed = self._processing(logits, removed if self._listeners else None)
        self._observed.keep(self.session.rows.lengths, logits, processed, removed)
        return processed

    def guess(self, next_logits: Callable[[], Tensor], count: int) -> Tensor:
        """The next tokens that the sampler would choose by other logits: (rows, count).

        For drafts. next_logits: called for each token, once the session and its followers have
        moved by the tokens before it; in the end they are rewound. Returns (rows, vocab).
        """
        session = self.session
        guesses = []
        with self._observed.ignoring():
            for _ in range(count):
                choice = self.sampler.step(self.process(next_logits()), session.rows)
                check_choice(choice, self.sampler, len(self.live))
                guesses.append(choice.tokens.clone())  # the sampler may use its tensor again
                session.move(choice.tokens)
            session.rewind(count)
        return torch.stack(guesses, dim=1)

    def commit(self, choice: Choice, *, extended: bool = False) -> None:
        """Make the choice: end the rows that end, and extend the session by the others.

        extended: the session has one row for each candidate, in their order, which already ends
        with its token; the rows are then only selected.
        """
        check_choice(choice, self.sampler, len(self.live))
        waiting = self._waiting()
        logits = self._choice_logits() if self._watched else None
        candidates = self._sorted(choice, waiting, logits, extended=extended)
        if self._listeners and logits is not None:
            self._tell(choice, waiting, candidates.outcomes, logits)
        if self.sampler.competing:
            self._check_dead_ends(candidates)
        going_on, finished = self._searches.settled(candidates.kept, candidates.ended)
        self.live = [row for _, row in going_on]
        self._searches.store(finished)
        if self.live:
            self._move([index for index, _ in going_on], candidates.placeholders, extended)
        self._observed.moved(self.session.rows.lengths)
        self._choices += 1

    @property
    def _watched(self) -> bool:
        """Whether anyone looks at the logits of a choice."""
        return bool(self._listeners or self._top_logprobs)

    def _choice_logits(self) -> ChoiceLogits:
        """The logits of this choice; the model's if the sampler asked for no processing."""
        kept = self._observed.take()
        if kept is not None:
            return kept
        logits = self.session.logits
        return ChoiceLogits(logits, logits, {})

    def _waiting(self) -> list[bool]:
        """For each row of the session whether it waits for the model, which happens with a draft.

        The logits of a waiting row are unknown, so the token chosen for it is a placeholder.
        """
        known = self.session.known
        return [False] * len(known) if self._speculation is None else [not k for k in known]

    def _sorted(
        self,
        choice: Choice,
        waiting: Sequence[bool],
        logits: ChoiceLogits | None,
        *,
        extended: bool,
    ) -> Candidates:
        """Sort the candidates into rows that can go on and rows that end.

        Raises PluginError or DecodingError for invalid candidates, before anything moves.
        """
        parents, tokens, logprobs, scores = _to_lists(choice)
        vocab_size = self.session.model.config.vocab_size
        check_values(self.sampler, parents, tokens, rows=len(self.live), vocab_size=vocab_size)
        searches, places = self._searches, self._searches.places
        kept: list[list[GoingOn]] = [[] for _ in range(len(searches))]
        ended: list[list[Hypothesis]] = [[] for _ in range(len(searches))]
        ranks = [0] * len(searches)  # of each search's next candidate, best first
        outcomes: list[Hypothesis | None] = []
        placeholders: dict[int, int] = {}
        late = self.limits.is_late()
        top = logits.top(self._top_logprobs) if logits is not None and self._top_logprobs else None
        for number, (parent, token, logprob, score) in enumerate(
            zip(parents, tokens, logprobs, scores, strict=True)
        ):
            row = self.live[parent]
            search = searches.index(row)
            index = number if extended else parent  # of the session's row with the row's tokens
            outcome = None
            if waiting[index]:
                placeholders[index] = token
                kept[search].append((index, row))
            elif score > -torch.inf and logprob == logprob:  # no NaN
                longer = self._extender.extend(
                    row,
                    index,
                    token,
                    logprob=logprob,
                    score=score,
                    limit=searches.limit(row),
                    late=late,
                    top=None if top is None else top[parent],
                )
                if longer.reason is None and len(kept[search]) < places:
                    kept[search].append((index, longer))
                    outcome = longer
                elif longer.reason is not None and ranks[search] < places:
                    ended[search].append(longer)
                    outcome = longer
                ranks[search] += 1
            elif not self.sampler.competing:
                self._explain(parent, token)
            outcomes.append(outcome)
        return Candidates(kept, ended, outcomes, placeholders)

    def _move(self, parents: list[int], placeholders: dict[int, int], extended: bool) -> None:
        """Have the session's rows be those that go on, each with its new token.

        parents: for each live row the session's row that it continues.
        """
        if self._speculation is not None:
            self._speculation.select(parents)
        self.session.select(parents)
        self.session.rows.set_scores(
            [row.score for row in self.live], [row.total for row in self.live]
        )
        if extended:
            return
        tokens = torch.tensor(
            [
                placeholders.get(parent, row.token)
                for parent, row in zip(parents, self.live, strict=True)
            ],
            device=self.session.model.device,
        )
        if self._speculation is None:
            self.session.extend(tokens)
            return
        waiting = [parent in placeholders for parent in parents]
        self._speculation.move(self.session, tokens, waiting)
        if not any(self.session.known):
            self._guess()

    def _guess(self) -> None:
        """Let the draft guess, and the model read the guesses."""
        assert self._speculation is not None
        limits = [self._searches.limit(row) for row in self.live]
        self._speculation.guess(self, self.live, limits)

    def _tell(
        self,
        choice: Choice,
        waiting: list[bool],
        outcomes: list[Hypothesis | None],
        logits: ChoiceLogits,
    ) -> None:
        step = DecodingStep(
            number=self.steps,
            rows=tuple(self.live),
            waiting=tuple(waiting[: len(self.live)]),
            logits=logits.logits,
            processed=logits.processed,
            removed=logits.removed,
            choice=choice,
            outcomes=tuple(outcomes),
        )
        self._listeners.tell(step)

    def _follow(self, state: object, whose: str) -> None:
        check_state(state, whose)
        if isinstance(state, Follower):
            self.session.follow(state)

    def _check_dead_ends(self, candidates: Candidates) -> None:
        """Raises DecodingError where all rows of a prompt are at a dead end, with no result."""
        for index, row in enumerate(self.live):
            if self._searches.is_empty(row.prompt, candidates.kept, candidates.ended):
                self._explain(index, 0)

    def _explain(self, index: int, token: int) -> None:
        """Raise a DecodingError that names what left a row without a token to choose, or NaN."""
        row = self.live[index]
        where = f"after {row.length} new tokens"
        if len(self._searches) > self._searches.groups:
            where += f" of prompt {row.prompt + 1}"
        self._processing.explain(self.sampler, self.session, index, token, where)


def _to_lists(choice: Choice) -> tuple[list[int], list[int], list[float], list[float]]:
    """parents, tokens, log-probabilities and scores on the host."""
    tokens = choice.tokens.tolist()
    parents = list(range(len(tokens))) if choice.parents is None else choice.parents.tolist()
    return parents, tokens, choice.logprobs.tolist(), choice.scores.tolist()
