"""A run's logits processors, started on its rows; and which of them left a row without a token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from gptk.errors import DecodingError
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.plugins.returned import check_logits, check_process
from gptk.session.rows import Rows
from gptk.session.session import DecodeSession

if TYPE_CHECKING:
    from gptk.hooks.sampling import Process


class Processing:
    """The processors of a run, started on its rows."""

    def __init__(self, rows: Rows, processors: Sequence[LogitsProcessor]) -> None:
        self.started: list[tuple[str, Process]] = []
        """For each processor its name, and the function to call at each step."""
        self._rows = rows
        for processor in processors:
            process = processor.start(rows)
            check_process(process, processor.name)
            self.started.append((processor.name, process))

    def __call__(self, logits: Tensor, removed: dict[str, Tensor] | None = None) -> Tensor:
        """The logits after all processors, (rows, vocab).

        A processor may write into what it gets: the first gets a copy of the logits, and each its
        copy of the rows' tokens. removed: filled with how many tokens each processor took out of
        each row, (rows,) by name.
        """
        if self.started:
            logits = logits.clone()
        for name, process in self.started:
            before = logits if removed is None else logits.clone()
            logits = process(logits, self._rows)
            self._rows.forget_copy()
            check_logits(logits, name, before)
            if removed is not None:
                count = (logits.isneginf() & ~before.isneginf()).sum(dim=-1)
                removed[name] = removed[name] + count if name in removed else count
        return logits

    def explain(
        self, sampler: Sampler, session: DecodeSession, index: int, token: int, where: str
    ) -> NoReturn:
        """Raise a DecodingError that names the processor which left a row no token, or NaN.

        Where no processor did, it names the sampler, or the model. index: the row's. token: what
        the sampler chose for it. where: the end of the message.
        """
        logits = sampler.logits(session).clone()
        if not _is_distribution(logits[index]):
            raise DecodingError("the model's logits are not numbers; are its weights damaged?")
        for name, process in self.started:
            logits = process(logits, self._rows)
            self._rows.forget_copy()
            if bool((logits[index] == -torch.inf).all()):
                raise DecodingError(f"processor {name} left no token to choose from {where}")
            if not _is_distribution(logits[index]):
                raise DecodingError(f"processor {name} gave logits that are not numbers {where}")
        if bool(logits[index, token] == -torch.inf):
            what = "chose a token that the processors had taken out"
        else:
            what = "gave its token a score or log-probability that is no number"
        raise DecodingError(f"sampler {sampler.name} {what} {where}")


def _is_distribution(logits: Tensor) -> bool:
    """Whether softmax gives probabilities. logits: (vocab,)."""
    return bool(logits.amax().isfinite())  # NaN is the largest
