"""Speculation: a draft guesses, the model reads the guesses in one pass, accepted ones are counted.

With a draft, rows run ahead of each other: a row whose next token was not guessed waits until no
row has known logits, and then the model reads the tokens of all rows at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gptk.decoding.checks import check_guesses
from gptk.errors import PluginError
from gptk.hooks.drafting import Draft, Drafter
from gptk.hooks.results import Hypothesis
from gptk.hooks.run import Run
from gptk.session.session import DecodeSession


@dataclass
class Acceptance:
    """How many tokens a draft has guessed, and how many of these the sampler chose."""

    guessed: int = 0
    accepted: int = 0


class Speculation:
    """The draft of one run."""

    def __init__(self, drafter: Drafter, run: Run) -> None:
        self._drafter = drafter
        self.draft: Draft = drafter.start(run)
        self.acceptance = Acceptance()
        self._open_guesses = [0] * len(run.session.rows)
        """For each row how many guesses are still to be compared with what is chosen."""
        if not hasattr(self.draft, "propose"):
            raise PluginError(
                f"drafter {drafter.name}: start() returned {self.draft!r:.80}; it must return an "
                "object with propose()"
            )

    def guess(self, run: Run, live: Sequence[Hypothesis], limits: Sequence[int]) -> None:
        """Let the draft guess, and the model read the guesses after each row's unread tokens.

        limits: for each row the most new tokens it may have.
        """
        session, rows = run.session, run.session.rows
        room = max(limit - row.length - 1 for row, limit in zip(live, limits, strict=True))
        room = min(room, session.model.config.context_length - max(rows.lengths))
        guesses: Tensor | None = self.draft.propose(run, room) if room > 0 else None
        if guesses is not None:
            guesses = check_guesses(
                guesses,
                f"drafter {self._drafter.name}",
                rows=len(live),
                most=room,
                vocab_size=session.model.config.vocab_size,
            )
            self._open_guesses = (guesses >= 0).sum(dim=1).tolist()
            self.acceptance.guessed += sum(self._open_guesses)
            guesses = guesses.clamp(min=0)  # any token will do where there is no guess
        session.read(guesses)

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]."""
        self._open_guesses = [self._open_guesses[parent] for parent in parents]

    def move(self, session: DecodeSession, tokens: Tensor, waiting: Sequence[bool]) -> None:
        """Move the rows, except those that wait, and count the guesses that were right."""
        session.move(tokens)
        if any(waiting):
            session.rewind([int(waits) for waits in waiting])
        for row, (guesses, known) in enumerate(zip(self._open_guesses, session.known, strict=True)):
            self.acceptance.accepted += bool(guesses and known)
            self._open_guesses[row] = max(guesses - 1, 0)
