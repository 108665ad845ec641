"""What happened at each step of decoding, as JSON lines: `gptk generate --trace FILE.jsonl`.

The first line of a run has the version of gptk, the sampler and its processors. Then each row and
step has a line, with the entropy of the distribution (in nats, after the processors), how many
tokens each processor removed, and the candidates that extend the row: the token, its text, its
log-probability, the score of the row with it, whether it was taken (candidates of competing rows
may not be), and the reason if the row ends with it.

All runs that one observer listens to, such as those of a batch of prompts, write to the same file.
Each line has the ordinal of its prompt.
"""

import json
import weakref
from pathlib import Path
from typing import Any

from pydantic import Field

import gptk


class Trace(gptk.DecodingObserver):
    """Writes every step to a file, as JSON lines."""

    name = "trace"
    example = "path=steps.jsonl"
    positional = "path"

    path: Path = Field(description="the file to write; an existing one is overwritten")

    @classmethod
    def to_file(cls, path: str) -> "Trace":
        return cls(path=Path(path))

    def start(self, run: gptk.Run) -> "Writer":
        """Raises OptionError if the file cannot be written."""
        try:
            writer = Writer(self.path, run, append=_begun.get(id(self)) is self)
        except OSError as error:
            raise gptk.OptionError(
                f"trace: {self.path} cannot be written: {error.strerror or error}"
            ) from None
        _begun[id(self)] = self
        return writer


_begun: "weakref.WeakValueDictionary[int, Trace]" = weakref.WeakValueDictionary()
"""Observers that have begun their file, by their ids."""


class Writer(gptk.DecodingListener):
    """Writes the lines of a run."""

    def __init__(self, path: Path, run: gptk.Run, *, append: bool) -> None:
        self._tokenizer = run.tokenizer
        rows = run.session.rows
        self._ordinals = dict(zip(rows.prompts, rows.ordinals, strict=True))
        self._file = path.open("a", encoding="utf-8")  # so that no run overwrites another's lines
        if not append and path.is_file():
            self._file.truncate(0)
        self._write(
            gptk=gptk.__version__,
            ordinal=rows.ordinals[0],
            sampler=_spec(run.sampler),
            processors=[_spec(processor) for processor in run.processors],
        )

    def step(self, step: gptk.DecodingStep) -> None:
        candidates: list[list[dict[str, Any]]] = [[] for _ in step.rows]
        chosen = zip(
            step.parents,
            step.choice.tokens.tolist(),
            step.choice.logprobs.tolist(),
            step.choice.scores.tolist(),
            step.outcomes,
            strict=True,
        )
        for parent, token, logprob, score, outcome in chosen:
            candidate = {"token": token, "logprob": logprob, "score": score}
            if self._tokenizer is not None:
                candidate["text"] = self._tokenizer.decode([token])
            candidate["taken"] = outcome is not None
            if outcome is not None and outcome.reason is not None:
                candidate["ends"] = outcome.reason
            candidates[parent].append(candidate)
        entropy = step.entropy.tolist()
        removed = {name: counts.tolist() for name, counts in step.removed.items()}
        for index, row in enumerate(step.rows):
            if not step.waiting[index]:
                self._write(
                    step=step.number,
                    ordinal=self._ordinals[row.prompt],
                    sample=row.sample,
                    group=row.group,
                    length=row.length,
                    entropy=entropy[index],
                    removed={name: counts[index] for name, counts in removed.items()},
                    candidates=candidates[index],
                )

    def close(self) -> None:
        self._file.close()

    def _write(self, **line: Any) -> None:
        # JSON has no infinity: an impossible candidate has the score null.
        finite = json.loads(json.dumps(line), parse_constant=lambda _: None)
        self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        self._file.flush()


def _spec(plugin: gptk.Plugin) -> str:
    try:
        return plugin.spec
    except gptk.OptionError:  # a plug-in made in Python from an object has no spec string
        return plugin.name
