"""The trainer: the parts of a run put together, in one process or several.

    trainer = gptk.Trainer.start(gptk.TrainConfig(data=["book.txt"], steps=500), run="runs/book")
    trainer.train()

A step is a pure function of the weights, the optimizer's state and the step's number: the
learning rate, the windows and the random numbers (dropout) all follow from that number and the
seed. So a run that was killed and resumed goes on bit for bit as if it had not been.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from gptk.data.windows import Windows
from gptk.errors import OptionError
from gptk.hooks.training import LRScheduler, Regularizer, TrainingListener
from gptk.model.gpt import GPT
from gptk.model.slow_paths import tell_of_slow_training
from gptk.plots.runs import plot_runs
from gptk.plugins.blame import blaming
from gptk.runs.directory import CONFIG, RunDirectory, open_records
from gptk.system.devices import autocast_dtype
from gptk.system.files import write_text
from gptk.system.interrupts import Interrupts
from gptk.text.tokenizer import Tokenizer
from gptk.training.checkpointing import RunCheckpoints
from gptk.training.config import TrainConfig
from gptk.training.evaluation import Evaluator, sample_text
from gptk.training.failures import explaining_failures, explaining_preparation
from gptk.training.listeners import Listeners
from gptk.training.loader import StepLoader
from gptk.training.loop import Ending, TrainingLoop
from gptk.training.loss import BatchLoss
from gptk.training.optimizer import make_optimizer
from gptk.training.plan import TrainingPlan
from gptk.training.plugins import TrainingPlugins
from gptk.training.preparation import Prepared, prepare_new, prepare_resumed
from gptk.training.processes import Processes
from gptk.training.progress import TrainingProgress
from gptk.training.state import TrainingState
from gptk.training.step import TrainingStep

_log = logging.getLogger(__name__)


def _counter(name: str) -> Any:
    """A field of TrainingProgress as an attribute of the trainer."""
    return property(
        lambda trainer: getattr(trainer._progress, name),
        lambda trainer, value: setattr(trainer._progress, name, value),
    )


class Trainer:
    """Trains a GPT on windows of tokens; `start` and `resume` make a trainer from settings.

    model: in float32, on the device to train on; it is trained in place. train, validation: the
    windows to learn from and to evaluate on. tokenizer: for samples, and saved with the model.
    run: the directory for settings, metrics, checkpoints, samples and plots; by default nothing is
    written. processes: those that train together, by default this one. shard: give each process its
    part of the weights (FSDP2), not a copy (DDP). listeners: get every record of metrics.jsonl.

    A trainer changes no setting of the process. On a CPU, steps are up to a sixth faster if the
    process keeps the memory it frees: `gptk train` arranges that, and a program of your own can, by
    calling `gptk.keep_freed_memory()` once.

    Raises DataError if there are too few windows for a step or an evaluation, OptionError or
    UnknownNameError for plug-ins.
    """

    step_count: int = _counter("step")
    """Optimizer steps done."""
    epoch: int = _counter("epoch")
    """Passes over the training data that are complete."""
    position: int = _counter("position")
    """Training windows taken in the current epoch."""
    tokens_seen: int = _counter("tokens")
    """Tokens seen in all epochs."""
    best_loss: float = _counter("best_loss")
    """The lowest validation loss so far (of the averaged weights, if weights are averaged)."""
    best_step: int | None = _counter("best_step")
    """The step of the lowest validation loss."""

    def __init__(
        self,
        model: GPT,
        train: Windows,
        validation: Windows,
        config: TrainConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        run: str | Path | None = None,
        processes: Processes | None = None,
        shard: bool = False,
        listeners: Iterable[TrainingListener] = (),
    ) -> None:
        self.config = config = config or TrainConfig()
        self.model, self.tokenizer = model, tokenizer
        self.run = None if run is None else Path(run)
        self.train_windows, self.validation_windows = train, validation
        self.processes = processes or Processes()
        self.shard = shard
        if shard and self.processes.count == 1:
            raise OptionError(
                "sharding takes several processes: torchrun --nproc-per-node N -m gptk train …"
            )
        self._plugins = TrainingPlugins.create(config)
        self._listeners = list(listeners)
        self._dtype = autocast_dtype(config.dtype, model.device)
        tell_of_slow_training(model.device, self._dtype)
        self._plan = TrainingPlan(config, train, validation, self.processes.count)
        self._plan.check()
        self._directory = None if self.run is None else RunDirectory(self.run)
        self._progress = TrainingProgress()
        self._prepare_model()
        self._assemble()

    def _prepare_model(self) -> None:
        """Copy the weights into memory, enter training mode, and set up the regularizers."""
        for parameter in self.model.parameters():  # a loader may have mapped them from a file
            parameter.data = parameter.data.clone()
        self.model.train()
        with blaming(self.regularizers):
            for regularizer in self.regularizers:
                regularizer.setup(self.model)

    def _assemble(self) -> None:
        """Make the parts that do the work."""
        config, model, processes = self.config, self.model, self.processes
        self._loader = StepLoader(
            self.train_windows,
            step_windows=self.step_windows,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle=config.shuffle,
            drop_last=config.drop_last,
            rank=processes.rank,
            count=processes.count,
            pin=model.device.type == "cuda",
        )
        loss = BatchLoss(
            model,
            self.regularizers,
            processes,
            dtype=self._dtype,
            shard=self.shard,
            compile=config.compile,
            recompute=config.activation_checkpointing,
        )
        parameters = dict(model.named_parameters())  # after BatchLoss, which may shard them
        self._state = TrainingState(
            parameters,
            make_optimizer(model, parameters, self.regularizers, config),
            self.regularizers,
            {regularizer.name: {} for regularizer in self.regularizers},
        )
        self._checkpoints = RunCheckpoints(
            self._directory, config, processes, model, self.tokenizer, self._state, self._progress
        )
        self._step = TrainingStep(
            config,
            self._plugins,
            processes,
            model,
            self._loader,
            loss,
            self._state,
            self._progress,
            self.total_steps,
            self._checkpoints.last_good,
        )
        self._evaluator = Evaluator(
            config,
            processes,
            model,
            self.train_windows,
            self.validation_windows,
            loss,
            self._state,
            self._progress,
        )

    # --- Making a trainer from settings

    @classmethod
    def start(
        cls,
        config: TrainConfig | None = None,
        run: str | Path | None = None,
        *,
        shard: bool = False,
        listeners: Iterable[TrainingListener] = (),
    ) -> "Trainer":
        """A trainer at step 0: makes or loads the model, tokenizes the data.

        No other trainer can use the directory `run` until this one has trained, or is closed.
        Raises DataError, SourceError, TokenizerError, DeviceError, OptionError; TrainingError if
        `run` is a run already, a file, or in use by another trainer, or if memory does not hold the
        model.
        """
        folder = None if run is None else Path(run)
        with explaining_preparation(folder):
            prepared = prepare_new(config or TrainConfig(), folder)
            trainer = cls._from_prepared(prepared, folder, shard, listeners)
            trainer._claim()
        return trainer

    @classmethod
    def resume(
        cls,
        run: str | Path,
        changes: Iterable[str] = (),
        *,
        shard: bool = False,
        listeners: Iterable[TrainingListener] = (),
        warn: Callable[[str], None] | None = None,
    ) -> "Trainer":
        """A trainer that resumes from a run's last intact checkpoint, in any number of processes.

        changes: settings to change, as `key=value`, for example `steps=4000`. warn: gets
        a line for each damaged checkpoint and for changed data; by default it is logged.
        Raises TrainingError if there is no checkpoint, if another trainer uses the run, or if
        files of the run are damaged; OptionError for settings that are wrong, or cannot change.
        """
        folder, warn = Path(run), warn or _log.warning
        directory = RunDirectory(folder)
        try:
            with explaining_preparation(folder):
                prepared = prepare_resumed(directory, changes, warn)
                trainer = cls._from_prepared(prepared, folder, shard, listeners)
                assert trainer._directory is not None
                assert prepared.checkpoint is not None
                assert prepared.progress is not None
                trainer._checkpoints.load(prepared.checkpoint, prepared.progress)
                trainer._directory.take_over(directory)
        finally:
            directory.release()
        return trainer

    @classmethod
    def _from_prepared(
        cls,
        prepared: Prepared,
        run: Path | None,
        shard: bool,
        listeners: Iterable[TrainingListener],
    ) -> "Trainer":
        trainer = cls(
            prepared.model,
            prepared.train,
            prepared.validation,
            prepared.config,
            tokenizer=prepared.tokenizer,
            run=run,
            processes=prepared.processes,
            shard=shard,
            listeners=listeners,
        )
        trainer._progress.data_sums = prepared.data_sums
        return trainer

    # --- What a run is

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, with the parameter groups that the regularizers chose."""
        return self._state.optimizer

    @property
    def scheduler(self) -> LRScheduler:
        """The LR scheduler that the settings name."""
        return self._plugins.scheduler

    @property
    def regularizers(self) -> list[Regularizer]:
        """The regularizers that the settings name, in order."""
        return self._plugins.regularizers

    @property
    def context_length(self) -> int:
        """Tokens in a window."""
        return self._plan.context_length

    @property
    def step_windows(self) -> int:
        """Windows in a step: those of all accumulated batches, in all processes."""
        return self._plan.step_windows

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take each training window once, except those that drop_last leaves out."""
        return self._plan.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps in the whole run."""
        return self._plan.total_steps

    def describe(self) -> list[str]:
        """What is about to happen, in a few lines: sizes, counts of tokens and batches."""
        return self._plan.describe(self.model, self._dtype, shard=self.shard)

    # --- What a run does

    def step(self) -> dict[str, Any]:
        """Take one optimizer step; returns its record, see docs/training.md.

        Raises TrainingError where loss or gradient is not finite, unless on_nan is skip. The
        weights are then those before the step.
        """
        return self._step()

    def evaluate(self) -> dict[str, Any]:
        """Mean losses over a fixed set of batches; returns a record, see docs/training.md."""
        return self._evaluator()

    def sample(self) -> dict[str, Any]:
        """Sample a text; returns a record. The text is empty except in the main process."""
        text = ""
        weights = self._state.whole_weights() if self.shard else None
        if self.processes.main:
            sampler = self._plugins.sampler
            text = sample_text(self.model, self.tokenizer, sampler, self.config, weights)
        return {
            "kind": "sample",
            "step": self.step_count,
            "prompt": self.config.sample_prompt,
            "text": text,
        }

    def save(self) -> Path | None:
        """Write a checkpoint, unless there is no run directory. Returns its directory.

        Raises TrainingError if it cannot be written; the checkpoints before it stay.
        """
        return self._checkpoints.save(shard=self.shard)

    def close(self) -> None:
        """Let other trainers use the run directory; `train` does so when it ends.

        A trainer that goes on, or saves, uses the directory again: it raises TrainingError if
        another trainer has saved a checkpoint there meanwhile.
        """
        if self._directory is not None:
            self._directory.release()

    def train(self) -> Ending:
        """Train to the last step. On Ctrl-C or SIGTERM, finish the step, save, and end.

        Returns how it ended: finished, patience (no better validation loss for `patience`
        evaluations), or interrupted. Raises TrainingError; the checkpoints written stay.
        """
        listeners = Listeners()
        try:
            with explaining_failures(self.model.device, self._checkpoints.last_good):
                self._start(listeners)
                with Interrupts() as interrupts, blaming([self.scheduler, *self.regularizers]):
                    ending = self._loop(listeners, interrupts).run()
                if self.run is not None and self.processes.main:
                    plot_runs([self.run], self.run / "losses.png")
        finally:
            self._loader.close()
            listeners.close()
            self.close()
        return ending

    def _start(self, listeners: Listeners) -> None:
        """In the main process: claim the run directory, open its files, start the observers."""
        if not self.processes.main:
            return
        listeners.add(self._listeners)
        if self.run is not None:
            self._claim()
            write_text(self.run / CONFIG, self.config.to_toml(comments=True))
            listeners.add(open_records(self.run, self.step_count))
        listeners.start(self._plugins.observers, self.run)

    def _claim(self) -> None:
        """In the main process: keep other trainers out of the run directory."""
        if self._directory is not None and self.processes.main:
            self._directory.claim()

    def _loop(self, listeners: Listeners, interrupts: Interrupts) -> TrainingLoop:
        samples = bool(self.config.sample_tokens) and self.tokenizer is not None
        return TrainingLoop(
            self.config,
            self._progress,
            self.total_steps,
            take_step=self.step,
            evaluate=self.evaluate,
            sample=self.sample if samples else None,
            save=self.save,
            tell=listeners.tell,
            stop_asked=lambda: self.processes.any(interrupts.asked),
        )
