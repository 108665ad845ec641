"""The searches of a run: the results so far of each prompt, or of each group of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gptk.decoding.limits import Limits
from gptk.hooks.results import Hypothesis
from gptk.hooks.sampling import Sampler
from gptk.session.session import DecodeSession

GoingOn = tuple[int, Hypothesis]
"""The index of a session's row that goes on, and its hypothesis with the new token."""


@dataclass
class Search:
    """The results of one prompt, or of one group of its rows."""

    limit: int
    """The most new tokens of a row."""
    finished: list[Hypothesis] = field(default_factory=list)


class Searches:
    """All searches of a run, those of one prompt adjacent.

    n: results asked for, for each prompt; copies: rows that each prompt begins with.
    """

    def __init__(
        self, sampler: Sampler, session: DecodeSession, limits: Limits, *, n: int, copies: int
    ) -> None:
        self._sampler = sampler
        self.groups = sampler.groups if sampler.competing else 1
        self.places = sampler.max_rows(n) // self.groups
        """The most rows that a search has at a time."""
        window, slides = session.model.config.context_length, session.overflow == "slide"
        most = limits.max_new_tokens
        self._all = [
            Search(most if slides else min(most, window - length))
            for length in session.rows.prompt_lengths[::copies]
            for _ in range(self.groups)
        ]

    def __len__(self) -> int:
        return len(self._all)

    def index(self, row: Hypothesis) -> int:
        """The number of the search that a row belongs to."""
        return row.prompt * self.groups + row.group

    def limit(self, row: Hypothesis) -> int:
        """The most new tokens that a row may have."""
        return self._all[self.index(row)].limit

    def finished(self, prompt: int) -> list[Hypothesis]:
        """The results of a prompt so far, search by search."""
        searches = self._all[prompt * self.groups : (prompt + 1) * self.groups]
        return [row for search in searches for row in search.finished]

    def settled(
        self, kept: Sequence[list[GoingOn]], ended: Sequence[list[Hypothesis]]
    ) -> tuple[list[GoingOn], list[list[Hypothesis]]]:
        """What goes on, and the results of each search, once rows have ended.

        kept and ended: for each search the rows that could go on, and those that have just ended.
        Results of rows that compete are the best of each search, as many as it has places; a
        search that the sampler calls done keeps no rows.
        """
        finished = [search.finished + new for search, new in zip(self._all, ended, strict=True)]
        if self._sampler.competing:
            finished = [
                sorted(results, key=self.rank, reverse=True)[: self.places] for results in finished
            ]
            kept = [
                [] if self._is_done(search, results, rows) else rows
                for search, results, rows in zip(self._all, finished, kept, strict=True)
            ]
        return [row for rows in kept for row in rows], finished

    def store(self, finished: Sequence[list[Hypothesis]]) -> None:
        """Keep the results that `settled` returned."""
        for search, results in zip(self._all, finished, strict=True):
            search.finished = results

    def results(self, prompt: int, live: Sequence[Hypothesis]) -> list[Hypothesis]:
        """The results of a prompt; its rows that are still live count as interrupted.

        Competing rows come best first, others in the order of their sample index.
        """
        results = self.finished(prompt)
        results += [replace(row, reason="interrupted") for row in live if row.prompt == prompt]
        if self._sampler.competing:
            return sorted(results, key=self.rank, reverse=True)
        return sorted(results, key=lambda row: row.sample)

    def rank(self, row: Hypothesis) -> float:
        """What the sampler ranks a hypothesis by."""
        return self._sampler.rank(row.score, row.length)

    def is_empty(
        self, prompt: int, kept: Sequence[Sequence[object]], ended: Sequence[Sequence[object]]
    ) -> bool:
        """Whether a prompt has neither a row that goes on nor a result."""
        first = prompt * self.groups
        return not any(
            kept[number] or ended[number] or self._all[number].finished
            for number in range(first, first + self.groups)
        )

    def _is_done(
        self, search: Search, results: Sequence[Hypothesis], kept: Sequence[GoingOn]
    ) -> bool:
        if not kept or not results:
            return False
        best = max((row for _, row in kept), key=lambda row: row.score)
        ranks = [self.rank(row) for row in results]
        return self._sampler.is_done(ranks, best.score, best.length, search.limit)
