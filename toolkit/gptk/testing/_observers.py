"""The contracts of decoding observers and training observers."""

import math
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

import gptk
from gptk.testing._decoding import (
    MANY,
    PROMPTS,
    Result,
    Together,
    decode_in_turns,
    decode_together,
    lm_with_text,
)
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, promise, undisturbed


class DecodingObserverContract(PluginContract):
    """What a decoding observer promises."""

    _base: ClassVar[type] = gptk.DecodingObserver

    @promise
    def test_it_hears_every_step(self) -> None:
        """It takes every step of every kind of run without an error, and the end of each run.

        In use, an observer that fails is named in a warning and hears no more.
        """
        for sampler in ("greedy", "multinomial", "beam:width=3"):
            for more in ({}, {"draft": "lookup:ngram=1"}, {"processors": ["top-k:k=3"]}):
                if "draft" not in more or "beam" not in sampler:
                    self._run(PROMPTS, sampler=sampler, observers=[self.plugin()], **more)

    @promise
    def test_it_changes_nothing(self) -> None:
        """With it the results are those without it; logits and tokens stay as they were.

        It does not use the global random generators.
        """
        for sampler in ("multinomial", "beam:width=3"):
            want = self._run(PROMPTS, sampler=sampler)
            with undisturbed():
                got = self._run(
                    PROMPTS, sampler=sampler, observers=[_Guarded(observer=self.plugin())]
                )
            check(got == want, f"with it {sampler} gives other results")

    @promise
    def test_one_instance_serves_several_calls(self) -> None:
        """It may listen to several runs, one after the other and at the same time.

        What it remembers of a run belongs into the listener that `start` returns: after a run the
        observer's options and attributes are what they were.
        """
        lm, plugin = lm_with_text(), self.plugin()
        before = _state(plugin)
        want = [self._run(prompts) for prompts in (PROMPTS, MANY)]
        settings: dict[str, Any] = {"observers": [plugin], "max_new_tokens": 4}
        batch = lm.generate_batch(PROMPTS, seed=0, max_new_tokens=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error", gptk.PluginWarning)
            for _ in range(2):
                calls = [Together(lm, prompts, **settings) for prompts in (PROMPTS, MANY)]
                check(decode_in_turns(calls) == want, "two runs in turns give other results")
                again = lm.generate_batch(PROMPTS, seed=0, **settings)
                check(again == batch, "the runs of a batch give other results")
        _check_unchanged(plugin, before)

    def _run(self, prompts: list[list[int]], **settings: Any) -> list[list[Result]]:
        """Decode the prompts in one run; a failure of the observer is an error."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", gptk.PluginWarning)
            return decode_together(lm_with_text(), prompts, max_new_tokens=4, **settings)


class _Guarded(gptk.DecodingObserver):
    """An observer whose steps must not change."""

    name = "guarded"
    observer: Any

    def start(self, run: gptk.Run) -> gptk.DecodingListener:
        return _GuardedListener(self.observer.start(run))


class _GuardedListener(gptk.DecodingListener):
    def __init__(self, listener: gptk.DecodingListener) -> None:
        self._listener = listener

    def step(self, step: gptk.DecodingStep) -> None:
        tensors = [step.logits, step.processed, step.choice.tokens, step.choice.scores]
        before = [tensor.clone() for tensor in tensors]
        self._listener.step(step)
        same = all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        check(same, "it changed logits, tokens or scores")

    def close(self) -> None:
        self._listener.close()


RECORDS: list[Mapping[str, Any]] = [
    {"kind": "evaluation", "step": 0, "train_loss": 5.5, "validation_loss": 5.5, "epoch": 0.0},
    {"kind": "step", "step": 1, "tokens": 64, "loss": 5.5, "lr": 1e-3, "grad_norm": 1.0},
    {"kind": "step", "step": 2, "tokens": 128, "loss": math.nan, "lr": 0.0, "grad_norm": math.inf},
    {"kind": "sample", "step": 2, "prompt": "Once", "text": "\nupon \u2028 a \0"},
    {"kind": "of a later version", "step": 3, "new": {"a": [1, None]}},
]
"""Records as a training run makes them; the last has a kind that no observer knows yet."""


class TrainingObserverContract(PluginContract):
    """What a training observer promises."""

    _base: ClassVar[type] = gptk.TrainingObserver

    @promise
    def test_it_hears_every_record(self) -> None:
        """It takes every record, one of a new type too, and the end of a run, without an error.

        `start` gets the run directory, or None where the run writes none; it may refuse that with
        an OptionError.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._hears(self.plugin().start(Path(folder)))
            try:
                listener = self.plugin().start(None)
            except gptk.OptionError:  # it needs a directory
                return
            self._hears(listener)

    @promise
    def test_one_instance_serves_several_calls(self) -> None:
        """It may listen to several runs, one after the other and at the same time.

        What it remembers of a run belongs into the listener that `start` returns.
        """
        plugin = self.plugin()
        before = _state(plugin)
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder) / name for name in ("one", "two")]
            for run in runs:
                run.mkdir()
            for _ in range(2):
                listeners = [plugin.start(run) for run in runs]
                for record in RECORDS:
                    for listener in listeners:
                        listener.record(dict(record))
                for listener in listeners:
                    listener.close()
        _check_unchanged(plugin, before)

    def _hears(self, listener: gptk.TrainingListener) -> None:
        for record in RECORDS:
            passed = dict(record)
            listener.record(passed)
            check(passed == record, "it changed the record")
        listener.close()


def _state(plugin: gptk.plugins.Plugin) -> dict[str, str]:
    """An observer's options, attributes and its class's variables, in words."""
    kind = type(plugin)
    of_class = {name: getattr(kind, name, None) for name in kind.__class_vars__}
    state = of_class | vars(plugin) | (plugin.__pydantic_private__ or {})
    return {name: repr(value) for name, value in state.items()}


def _check_unchanged(plugin: gptk.plugins.Plugin, before: dict[str, str]) -> None:
    now = _state(plugin)
    changed = [name for name in now if now[name] != before.get(name)]
    check(not changed, f"it keeps what it heard in {', '.join(changed)}, not in its listener")
