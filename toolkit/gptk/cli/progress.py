"""How far a command is with its prompts: rate and time left, on standard error."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gptk.cli.output import note, quiet
from gptk.cli.shared import duration
from gptk.errors import GptkError, counted

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from gptk.hooks.results import Generation

_PLAIN_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Counts prompts and tokens, and shows them: on a terminal a bar, elsewhere a line every ten
    seconds, with --quiet nothing.

    total: the prompts; None if their number is not known. unit: what one of them is called.
    """

    def __init__(self, total: int | None, unit: str = "prompt") -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self._unit = unit
        self.errors = 0
        """The prompts that have failed."""
        self._done_before = 0
        self._start = self._told = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._start = self._told = time.monotonic()
        if sys.stderr.isatty() and not quiet():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            self._bar = Bar(
                BarColumn(), TextColumn("{task.description}"), console=console, transient=True
            )
            self._bar.add_task(self.done_of_all(), total=self.total, completed=self.done)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def go_on(self, done: int, errors: int) -> None:
        """Count what was done earlier."""
        self.done = self._done_before = done
        self.errors = errors

    def add(self, result: "Generation | GptkError") -> None:
        """Count a result, and show how far it is now."""
        self.done += 1
        if isinstance(result, GptkError):
            self.errors += 1
        else:
            self.tokens += sum(len(one.tokens) for one in (result, *result.alternatives))
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=self.done, description=self._rates())
        elif time.monotonic() - self._told >= _PLAIN_EVERY:
            self._told = time.monotonic()
            note(self._rates())

    def done_of_all(self) -> str:
        """How many prompts are done: `3 of 12 prompts`."""
        if self.total is None:
            return counted(self.done, self._unit)
        return f"{self.done:,} of {counted(self.total, self._unit)}"

    def summary(self) -> str:
        """The closing line."""
        errors = f", {self.errors:,} with an error" if self.errors else ""
        return (
            f"{counted(self.done, self._unit)}{errors}, {counted(self.tokens, 'new token')}, "
            f"{self.tokens / self._seconds():.1f} tokens/s"
        )

    def _rates(self) -> str:
        seconds, done = self._seconds(), self.done - self._done_before
        line = f"{self.done_of_all()}, {done / seconds:.3g} {self._unit}s/s"
        line += f", {self.tokens / seconds:.0f} tokens/s"
        if self.total is not None:
            line += f", {duration((self.total - self.done) * seconds / done)} left"
        return line

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)
