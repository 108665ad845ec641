"""The training loop, once: steps, evaluation, samples, checkpoints, in one process or several.

    trainer = gptk.Trainer.start(gptk.TrainConfig(data=["book.txt"], steps=500), run="runs/book")
    trainer.train()

A step is a pure function of the weights, the optimizer's state and the step's number: the
learning rate, the windows and the random numbers (dropout) all follow from that number and the
seed. So a run that was killed and resumed goes on bit for bit as if it had not been.
"""

import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from numbers import Real
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputing

from gptk import kernels
from gptk.data.token_files import prepare_tokens
from gptk.data.windows import Windows, check_enough
from gptk.errors import (
    GptkError,
    OptionError,
    PluginError,
    SourceError,
    TrainingError,
    out_of_memory,
)
from gptk.hooks.sampling import Sampler
from gptk.hooks.training import LRScheduler, Regularizer, TrainingListener, TrainingObserver
from gptk.hooks.weights import Checkpoint
from gptk.language_model import LanguageModel
from gptk.model.gpt import GPT
from gptk.model.linear import Linear
from gptk.plots.runs import plot_runs
from gptk.plugins.blame import blaming, expect, warn_of_failure
from gptk.plugins.creating import create
from gptk.runs import checkpoints
from gptk.runs.metrics import MetricsFile, truncate_metrics
from gptk.runs.samples import SamplesFile
from gptk.system.devices import autocast_dtype, resolve_device
from gptk.system.files import lock, write_text
from gptk.system.interrupts import Interrupts
from gptk.system.memory import keep_freed_memory
from gptk.text.tokenizer import Tokenizer
from gptk.training import processes as distributed
from gptk.training import state as train_state
from gptk.training.config import TrainConfig, read_config
from gptk.training.gradients import gradient_norm
from gptk.training.loader import Batch, StepData, StepLoader
from gptk.training.objective import Objective, chunked_loss
from gptk.training.processes import Processes
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk.weights.saving import write_model
from gptk.weights.tokenizers import load_tokenizer

Ending = Literal["finished", "patience", "interrupted"]

# Settings that made the weights; in a run that goes on they stay.
_FIXED = (
    "model",
    "architecture",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "width",
    "mlp_width",
    "qkv_bias",
    "tied_head",
    "tokenizer",
)


class Trainer:
    """Trains a GPT on windows of tokens; `start` and `resume` make one from settings.

    model: in float32, on the device to train on. train, validation: what to learn from and what
    to evaluate on. run: the directory for settings, metrics, checkpoints, samples and plots;
    without one nothing is written. listeners: told of every record, as metrics.jsonl has it.

    Raises DataError if either has not one batch, OptionError or UnknownNameError for plug-ins.
    """

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
        plugins = _Plugins(config)
        self.scheduler, self.regularizers = plugins.scheduler, plugins.regularizers
        self._sampler, self._observers = plugins.sampler, plugins.observers
        self._listeners = list(listeners)
        self._dtype = autocast_dtype(config.dtype, model.device)
        self._check_data()

        self.step_count = 0
        """Optimizer steps done."""
        self.epoch = 0
        self.position = 0
        """Windows taken in this epoch."""
        self.tokens_seen = 0
        self.best_loss = math.inf
        """The lowest validation loss so far (of averaged weights, where there are any)."""
        self.best_step: int | None = None
        self._evaluations_since_best = 0
        self._loader = StepLoader(
            train,
            step_windows=self.step_windows,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle=config.shuffle,
            drop_last=config.drop_last,
            rank=self.processes.rank,
            count=self.processes.count,
            pin=model.device.type == "cuda",
        )
        self._active: list[TrainingListener] = []
        self._observing: list[tuple[TrainingObserver, TrainingListener]] = []
        self._held: IO[bytes] | None = None
        self._data_sums: list[str] | None = None

        for parameter in model.parameters():  # what a loader mapped from a file becomes memory
            parameter.data = parameter.data.clone()
        if model.device.type == "cpu":
            keep_freed_memory()
        model.train()
        with blaming(self.regularizers):
            for regularizer in self.regularizers:
                regularizer.setup(model)
        if config.activation_checkpointing:
            for block in model.blocks:
                block.forward = partial(_recomputed, block.forward)
        looking = [one for one in self.regularizers if _looks(one)]
        self._apart = [one for one in looking if one.logits == "none"]
        self._looking = [one for one in looking if one.logits != "none"]
        self._whole_logits = any(
            one.logits == "batch" for one in self._looking
        ) or not _has_plain_head(model)
        objective = _NextToken(
            model,
            chunked=not self._whole_logits,
            regularized=self._regularized if self._looking else None,
        )
        if config.compile:
            kernels.available()  # a compiler takes the operators that there are
            for part in model.blocks if shard else [objective]:
                part.compile()
        self._objective = self.processes.spread(objective, model.blocks, shard=shard)
        self._parameters = dict(model.named_parameters())
        with blaming(self.regularizers):
            groups = self._groups()
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self._states: dict[str, dict[str, Tensor]] = {one.name: {} for one in self.regularizers}

    # --- Making one from settings

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

        Raises DataError, SourceError, TokenizerError, DeviceError, OptionError; TrainingError if
        `run` is a run already or a file, or memory does not hold the model.
        """
        config = config or TrainConfig()
        _Plugins(config)  # mistakes are told before any work
        folder = None if run is None else Path(run)
        processes = Processes.join(config.device)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise TrainingError(f"{folder} is a file; a run needs a directory")
        if folder is not None and checkpoints.best_checkpoint(folder):
            raise TrainingError(
                f"{folder} holds a run already; go on with it (--resume {folder}) or name another"
            )
        # A run that was killed before its first checkpoint has metrics, and may begin anew.
        if (
            folder is not None
            and (folder / "config.toml").exists()
            and not (folder / "metrics.jsonl").exists()
        ):
            raise TrainingError(f"{folder} has a config.toml of its own; name another directory")
        with _room_for_model():
            model, tokenizer = _model_and_tokenizer(config, processes)
            return cls._prepared(model, tokenizer, config, folder, processes, shard, listeners)

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
        """A trainer where a run's last intact checkpoint left off, in any number of processes.

        changes: settings to change, as `key=value`, for example `steps=4000`. warn: told of
        damaged checkpoints and changed data; by default they are warnings on standard error.
        Raises TrainingError if there is no checkpoint, or it does not fit the settings.
        """
        folder = Path(run)
        if not (folder / "config.toml").is_file():
            raise TrainingError(f"{folder} is not a training run: it has no config.toml")
        before = read_config(folder / "config.toml")
        config = read_config(folder / "config.toml", changes)
        processes = Processes.join(config.device)
        newest = None
        held = None
        if processes.main:
            held = _hold(folder)
            checkpoints.clean(folder)
            newest = checkpoints.newest_intact(folder, warn or _warn)
        newest = processes.tell(newest)
        assert newest is not None
        if fixed := {key for key in _FIXED if getattr(config, key) != getattr(before, key)}:
            raise OptionError(f"{', '.join(sorted(fixed))} cannot change in a run that goes on")
        with _room_for_model():
            checkpoint = load_checkpoint(str(newest))
        tokenizer = checkpoint.tokenizer() if checkpoint.tokenizer else None
        device = resolve_device(processes.device(config.device))
        with _room_for_model():
            model = build_model(checkpoint, device, torch.float32)
            trainer = cls._prepared(model, tokenizer, config, folder, processes, shard, listeners)
            stored = trainer._load_state(newest)
        if stored not in (None, trainer._data_sums) and processes.main:
            (warn or _warn)(f"the data is not what {folder} was trained on up to here")
        trainer._held = held
        return trainer

    @classmethod
    def _prepared(
        cls,
        model: GPT,
        tokenizer: Tokenizer | None,
        config: TrainConfig,
        run: Path | None,
        processes: Processes,
        shard: bool,
        listeners: Iterable[TrainingListener],
    ) -> "Trainer":
        if tokenizer is None:
            raise OptionError(
                "the model comes without a tokenizer; name one, such as tokenizer=gpt2"
            )
        if tokenizer.encoding.max_token_value >= model.config.vocab_size:
            raise OptionError(
                f"the tokenizer has tokens up to {tokenizer.encoding.max_token_value}, the model "
                f"a vocabulary of {model.config.vocab_size}; name the tokenizer of the model"
            )
        context = config.context_length or model.config.context_length
        if context > model.config.context_length:
            raise OptionError(
                f"context_length={context} is more than the model's {model.config.context_length}"
            )
        # One process writes the token files; the others then find them.
        for turn in (True, False):
            if processes.main == turn:
                tokens = prepare_tokens(config.data, tokenizer)
                first, last = tokens.split(config.train_ratio)
                sums = [tokens.sha256]
                if config.validation_data:
                    others = prepare_tokens(config.validation_data, tokenizer)
                    first, last = tokens.tokens, others.tokens
                    sums.append(others.sha256)
            processes.wait()
        trainer = cls(
            model,
            Windows(first, context, config.stride),
            Windows(last, context),
            config,
            tokenizer=tokenizer,
            run=run,
            processes=processes,
            shard=shard,
            listeners=listeners,
        )
        trainer._data_sums = sums
        return trainer

    # --- What the settings amount to

    @property
    def context_length(self) -> int:
        """Tokens a window."""
        return self.train_windows.context_length

    @property
    def step_windows(self) -> int:
        """Windows in one step: of all batches that are accumulated, in all processes."""
        return self.config.batch_size * self.config.accumulate * self.processes.count

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take each training window once, drop_last apart."""
        whole, rest = divmod(len(self.train_windows), self.step_windows)
        return whole + (1 if rest and not self.config.drop_last else 0)

    @property
    def total_steps(self) -> int:
        """Steps in all."""
        if self.config.epochs is not None:
            return max(1, round(self.config.epochs * self.steps_per_epoch))
        return self.config.steps

    def describe(self) -> list[str]:
        """What is about to happen, in a few lines: sizes, counts of tokens and batches."""
        config, batch = self.config, self.config.batch_size
        parameters = sum(one.numel() for one in self._parameters.values())
        lines = [
            f"model: {parameters:,} parameters, vocabulary {self.model.config.vocab_size:,}, "
            f"window {self.model.config.context_length:,}",
        ]
        for name, windows, full in (
            ("training", self.train_windows, config.drop_last),
            ("validation", self.validation_windows, False),
        ):
            batches = len(windows) // batch if full else -(-len(windows) // batch)
            lines.append(
                f"{name}: {len(windows.tokens):,} tokens, {batches:,} batches of {batch} by "
                f"{self.context_length}"
            )
        lines.append(
            f"{self.total_steps:,} steps of {self.step_windows * self.context_length:,} tokens, "
            f"{self.total_steps / self.steps_per_epoch:.2f} epochs; "
            f"device {self.model.device}, {str(self._dtype).removeprefix('torch.')}"
            + (f", {self.processes.count} processes" if self.processes.count > 1 else "")
            + (", sharded" if self.shard else "")
        )
        return lines

    def _check_data(self) -> None:
        config = self.config
        ratio = None if config.validation_data else config.train_ratio
        length = self.context_length
        check_enough(
            self.train_windows,
            self.step_windows if config.drop_last else 1,
            which="training",
            context_length=length,
            train_ratio=ratio,
        )
        check_enough(
            self.validation_windows,
            1,
            which="validation",
            context_length=length,
            train_ratio=ratio,
        )
        if self.processes.count > 1 and not config.drop_last:
            raise OptionError("drop_last=false works in one process only: batches must be equal")

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups: parameters for which the regularizers give the same options."""
        options: defaultdict[str, dict[str, float]] = defaultdict(dict)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                name = names.pop(id(parameter), None)
                if name is None:
                    continue  # shared, and asked about at its first owner
                for regularizer in self.regularizers:
                    options[name] |= expect(
                        regularizer,
                        "parameter_options",
                        regularizer.parameter_options(module, name, parameter),
                        Mapping,
                        "options by name, such as {}",
                    )
        groups: dict[tuple[tuple[str, float], ...], list[Tensor]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            chosen = {"weight_decay": 0.0, "lr_scale": 1.0} | options[name]
            groups[tuple(sorted(chosen.items()))].append(parameter)
        return [{"params": params, **dict(chosen)} for chosen, params in groups.items()]

    # --- One step

    def step(self) -> dict[str, Any]:
        """Take one optimizer step; returns its record, see docs/training.md.

        Raises TrainingError where loss or gradient is not finite, unless on_nan is skip. The
        weights are then those before the step.
        """
        self.model.train()
        data = self._loader.take(self.epoch, self.position)
        self.epoch, self.position = data.epoch, data.position
        windows = data.windows
        lr = self.config.lr * self._factor()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        on_gpu = self.model.device.type == "cuda"
        with torch.random.fork_rng([self.model.device] if on_gpu else []):
            torch.manual_seed(_key(self.config.seed, self.step_count, self.processes.rank))
            totals = self._backward(data)
        loss, objective = self.processes.sum(totals).div_(self.processes.count).tolist()
        figures: dict[str, float] = {}
        if math.isfinite(objective):
            figures = self._change_gradients()
        finite = math.isfinite(objective) and math.isfinite(figures["grad_norm"])
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite and self.config.on_nan == "stop":
            raise TrainingError(self._not_finite(loss, objective, figures, windows))
        self.step_count += 1
        self.tokens_seen += len(windows) * self.context_length
        self.position += len(windows)
        if finite:
            for regularizer in self.regularizers:
                regularizer.after_step(self.model, self._states[regularizer.name])
        return {
            "kind": "step",
            "step": self.step_count,
            "tokens": self.tokens_seen,
            "loss": loss,
            **({"objective": objective} if objective != loss else {}),
            "lr": lr,
            **figures,
            **({} if finite else {"skipped": True}),
        }

    def _factor(self) -> float:
        factor = self.scheduler(self.step_count, self.total_steps)
        return expect(self.scheduler, "factor", factor, Real, "a number")

    def _backward(self, data: StepData) -> Tensor:
        """Gradients of the mean loss over this process's windows. Returns loss and objective."""
        totals = torch.zeros(2, device=self.model.device, dtype=torch.float64)
        for number, batch in enumerate(data.batches, start=1):
            inputs, targets = self._to_device(batch)
            share = len(inputs) / len(data.mine)
            last = number == len(data.batches)
            with nullcontext() if last else self._without_sync():
                loss, objective = self._losses(inputs, targets)
                torch.autograd.backward(objective * share)
            totals += torch.stack((loss.detach(), objective.detach())).double() * share
        return totals

    def _losses(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross entropy, and in training what is minimized: that, regularized."""
        training = self.model.training
        with self._autocast():
            result = self._objective(inputs, targets)
        if self._whole_logits:
            loss = objective = F.cross_entropy(result.flatten(0, 1), targets.flatten())
            if training:
                objective = self._regularized(loss, result, targets)
        else:
            loss, objective = result
        if training and self._apart:
            logits = torch.empty(1, 0, self.model.config.vocab_size, device=targets.device)
            objective = _added(self._apart, self.model, objective, logits, targets[:1, :0])
        return loss, objective

    def _regularized(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss with what the regularizers that look at logits make of it."""
        return _added(self._looking, self.model, loss, logits, targets)

    def _without_sync(self) -> AbstractContextManager[None]:
        if self.processes.count == 1:
            return nullcontext()
        return distributed.without_sync(self._objective)

    def _autocast(self) -> torch.autocast:
        kind = self.model.device.type
        return torch.autocast(kind, self._dtype, enabled=self._dtype != torch.float32)

    def _to_device(self, batch: Batch) -> Batch:
        device = self.model.device
        return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)

    def _change_gradients(self) -> dict[str, float]:
        """Let the regularizers at the gradients; returns their figures and the norm."""
        figures: dict[str, float] = {}
        for regularizer in self.regularizers:
            given = expect(
                regularizer,
                "before_step",
                regularizer.before_step(self.model) or {},
                Mapping,
                "figures by name, or None",
            )
            figures |= {name: float(value) for name, value in given.items()}
        if "grad_norm" not in figures:
            figures["grad_norm"] = float(gradient_norm(self._parameters.values()))
        return figures

    def _not_finite(
        self, loss: float, objective: float, figures: Mapping[str, float], windows: np.ndarray
    ) -> str:
        what = f"the loss is {loss}"
        if math.isfinite(loss) and not math.isfinite(objective):
            what = f"the loss is {loss:.4f}, with what the regularizers add {objective}"
        elif math.isfinite(loss):
            what = f"the gradient's norm is {figures['grad_norm']}, the loss {loss:.4f}"
        starts = ", ".join(str(self.train_windows.start(int(one))) for one in windows[:8])
        more = f" and {len(windows) - 8} more" if len(windows) > 8 else ""
        return (
            f"step {self.step_count + 1}: {what}; its batch are the windows at the tokens {starts}"
            f"{more} of the training data (epoch {self.epoch + 1}). Try a lower lr, grad-clip, or "
            f"on_nan=skip; {self._last_good()}"
        )

    # --- Evaluation

    def evaluate(self) -> dict[str, Any]:
        """Mean losses over a fixed set of batches; returns a record, see docs/training.md."""
        start = time.perf_counter()
        record: dict[str, Any] = {
            "kind": "evaluation",
            "step": self.step_count,
            "tokens": self.tokens_seen,
            "epoch": self.epoch + self.position / max(len(self.train_windows), 1),
            "train_loss": self._mean_loss(self.train_windows),
            "validation_loss": self._mean_loss(self.validation_windows),
        }
        if (averaged := self._averaged()) is not None:
            with self._weights(averaged):
                record["averaged_validation_loss"] = self._mean_loss(self.validation_windows)
        record["seconds"] = time.perf_counter() - start
        return record

    @torch.no_grad()
    def _mean_loss(self, windows: Windows) -> float:
        """Over `eval_batches` batches a process, spread evenly over the data."""
        size, ranks = self.config.batch_size, self.processes
        count = min(self.config.eval_batches * size * ranks.count, len(windows))
        chosen = np.arange(count) * len(windows) // count
        batches = [chosen[at : at + size] for at in range(0, count, size)]
        totals = torch.zeros(2, device=self.model.device, dtype=torch.float64)
        self.model.eval()
        for at in range(0, len(batches), ranks.count):
            # Sharded models need all processes at each batch: those without one repeat the first.
            spare = at + ranks.rank >= len(batches)
            batch = batches[0 if spare else at + ranks.rank]
            inputs, targets = self._to_device(windows.batch(batch))
            loss, _ = self._losses(inputs, targets)
            if not spare:
                totals += torch.tensor([float(loss) * len(batch), len(batch)]).to(totals)
        self.model.train()
        if self.shard:
            distributed.reshard(self._objective)
        total, windows_seen = ranks.sum(totals).tolist()
        return float(total / windows_seen)

    def sample(self) -> dict[str, Any]:
        """Text from the current weights; returns a record."""
        text = ""
        weights = self._whole_weights() if self.shard else None
        if self.processes.main:
            model = self.model
            if weights is not None:
                checkpoint = Checkpoint(self.model.config, weights)
                model = build_model(checkpoint, self.model.device, torch.float32)
            lm = LanguageModel(model, self.tokenizer)
            text = lm.generate(
                self.config.sample_prompt,
                sampler=self._sampler,
                max_new_tokens=self.config.sample_tokens,
                seed=self.config.seed,
                overflow="slide",
            ).text
        return {
            "kind": "sample",
            "step": self.step_count,
            "prompt": self.config.sample_prompt,
            "text": text,
        }

    # --- The loop

    def train(self) -> Ending:
        """Train to the last step. Ctrl-C (and SIGTERM) finish the step, save, and end it.

        Returns how it ended: finished, patience (no better validation loss for so many
        evaluations), or interrupted. Raises TrainingError; the checkpoints written stay.
        """
        try:
            self._start_listeners()
            with Interrupts() as interrupts, blaming([self.scheduler, *self.regularizers]):
                ending = self._loop(interrupts)
            if self.run is not None and self.processes.main:
                plot_runs([self.run], self.run / "losses.png")
        except BrokenPipeError:  # who reads the output has gone; the program knows what to do
            raise
        except OSError as error:
            raise TrainingError(f"{error}; {self._last_good()}") from None
        except PluginError as error:
            raise PluginError(f"{error}; {self._last_good()}") from error
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise TrainingError(
                    f"out of memory on {self.model.device}: lower batch_size (and raise "
                    f"accumulate) or context_length; {self._last_good()}"
                ) from None
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise TrainingError(f"compile=true does not work here: {reason}") from None
        finally:
            self._loader.close()
            for listener in self._active:
                listener.close()
            for observer, listener in self._observing:
                with self._dropping(observer):
                    listener.close()
            if self._held is not None:
                self._held.close()
                self._held = None
        return ending

    def _loop(self, interrupts: Interrupts) -> Ending:
        config = self.config
        save_every = config.save_every or config.eval_every
        seconds, tokens = 0.0, self.tokens_seen
        if self.step_count == 0:
            self._evaluate_and_tell()
        while self.step_count < self.total_steps and not self._out_of_patience:
            start = time.perf_counter()
            record = self.step()
            seconds += time.perf_counter() - start
            interrupted = self.processes.any(interrupts.asked, self.model.device)
            done = self.step_count == self.total_steps
            if interrupted or done or self.step_count % config.log_every == 0:
                record["tokens_per_second"] = (self.tokens_seen - tokens) / seconds
                seconds, tokens = 0.0, self.tokens_seen
            if "tokens_per_second" in record or "skipped" in record:
                self._tell(record)
            better = False
            if done or self.step_count % config.eval_every == 0:
                better = self._evaluate_and_tell()
            over = interrupted or done or self._out_of_patience
            if over or better or self.step_count % save_every == 0:
                self.save()
            if over:
                return "finished" if done else "interrupted" if interrupted else "patience"
        return "patience" if self._out_of_patience else "finished"

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self._evaluations_since_best >= patience

    def _start_listeners(self) -> None:
        self._active, self._observing = [], []
        if not self.processes.main:
            return
        self._active += self._listeners
        if self.run is not None:
            self.run.mkdir(parents=True, exist_ok=True)
            self._held = self._held or _hold(self.run)
            write_text(self.run / "config.toml", self.config.to_toml(comments=True))
            # What was recorded after the checkpoint that a run goes on from comes once more.
            truncate_metrics(self.run / "metrics.jsonl", self.step_count or -1)
            self._active += [MetricsFile(self.run / "metrics.jsonl"), SamplesFile(self.run)]
        for observer in self._observers:
            try:
                self._observing.append((observer, observer.start(self.run)))
            except GptkError:  # raised on purpose, such as for a package that is not there
                raise
            except Exception as error:
                warn_of_failure(observer, error)

    def _tell(self, record: dict[str, Any]) -> None:
        for listener in self._active:
            listener.record(record)
        for observer, listener in list(self._observing):
            with self._dropping(observer):
                listener.record(record)

    @contextmanager
    def _dropping(self, observer: TrainingObserver) -> Iterator[None]:
        """An observer that fails is named in a warning and hears no more; training goes on."""
        try:
            yield
        except Exception as error:
            self._observing = [entry for entry in self._observing if entry[0] is not observer]
            warn_of_failure(observer, error)

    def _evaluate_and_tell(self) -> bool:
        """Evaluate and sample; whether the validation loss is the best so far."""
        record = self.evaluate()
        self._tell(record)
        if self.config.sample_tokens and self.tokenizer is not None:
            self._tell(self.sample())
        loss = record.get("averaged_validation_loss", record["validation_loss"])
        if self.step_count and loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step_count
            self._evaluations_since_best = 0
            return True
        self._evaluations_since_best += 1 if self.step_count else 0
        return False

    # --- Checkpoints

    def save(self) -> Path | None:
        """Write a checkpoint, unless there is no run directory. Returns its directory.

        Raises TrainingError if it cannot be written; the checkpoints before it stay.
        """
        if self.run is None:
            return None
        weights = self._whole_weights()
        averaged = self._averaged()
        if averaged is not None:
            averaged = {name: distributed.whole(one).cpu() for name, one in averaged.items()}
        try:
            new = self.processes.tell(
                checkpoints.temporary(self.run, self.step_count) if self.processes.main else None
            )
            assert new is not None
            if self.processes.main and not (self.run / "config.toml").exists():
                write_text(self.run / "config.toml", self.config.to_toml(comments=True))
            tensors = train_state.collect(self.optimizer, self._parameters, self._states)
            train_state.write(new, tensors, shard=self.shard, main=self.processes.main)
            self.processes.wait()
            if self.processes.main:
                write_model(new, self.model.config, weights, self.tokenizer)
                if averaged is not None:
                    (new / "averaged").mkdir()
                    write_model(new / "averaged", self.model.config, averaged, self.tokenizer)
                about = self._progress() | {"tensors": train_state.describe(tensors)}
                text = json.dumps(about, indent=1)
                (new / checkpoints.STATE).write_text(text, encoding="utf-8")
                new = checkpoints.publish(new, keep=self.config.keep)
            self.processes.wait()
        except (OSError, SafetensorError, SourceError) as error:
            checkpoints.clean(self.run)
            raise TrainingError(
                f"the checkpoint of step {self.step_count} cannot be written: {error}; "
                f"{self._last_good()}"
            ) from None
        return new

    def _progress(self) -> dict[str, Any]:
        return {
            "format": 1,
            "step": self.step_count,
            "epoch": self.epoch,
            "position": self.position,
            "tokens": self.tokens_seen,
            "best_step": self.best_step,
            "best_loss": None if self.best_step is None else self.best_loss,
            "evaluations_since_best": self._evaluations_since_best,
            # All random numbers follow from these two.
            "seed": self.config.seed,
            "processes": self.processes.count,
            "data": self._data_sums,
        }

    def _load_state(self, folder: Path) -> list[str] | None:
        """Go on from a checkpoint whose weights are already in the model.

        Returns the sums of the data that it was trained on.
        """
        try:
            about = json.loads((folder / checkpoints.STATE).read_text(encoding="utf-8"))
            self.step_count, self.epoch = about["step"], about["epoch"]
            self.position, self.tokens_seen = about["position"], about["tokens"]
            self.best_step = about["best_step"]
            self.best_loss = math.inf if self.best_step is None else about["best_loss"]
            self._evaluations_since_best = about["evaluations_since_best"]
            stored = about["tensors"]
            sums: list[str] | None = about["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{folder / checkpoints.STATE} cannot be read: {error}") from None
        train_state.read(folder, stored, self.optimizer, self._parameters, self._states)
        return sums

    def _last_good(self) -> str:
        last = None if self.run is None else checkpoints.last_checkpoint(self.run)
        if last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {last}, go on from it with --resume {self.run}"

    # --- Weights

    def _whole_weights(self) -> dict[str, Tensor]:
        """All weights without sharding, on the CPU; every process has to ask."""
        return {
            name: distributed.whole(one.detach()).cpu() for name, one in self._parameters.items()
        }

    def _averaged(self) -> Mapping[str, Tensor] | None:
        for regularizer in self.regularizers:
            state = self._states[regularizer.name]
            if state and (averaged := regularizer.averaged(state)) is not None:
                return averaged
        return None

    @contextmanager
    def _weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other weights in the place of the trained ones for a while."""
        with torch.no_grad():
            trained = {name: self._parameters[name].detach().clone() for name in weights}
            for name, weight in weights.items():
                self._parameters[name].copy_(weight)
            try:
                yield
            finally:
                for name, weight in trained.items():
                    self._parameters[name].copy_(weight)


def _hold(run: Path) -> IO[bytes]:
    """Keep other processes from training the same run."""
    held = lock(run / ".lock")
    if held is None:
        raise TrainingError(f"{run} is being trained by another process")
    return held


class _Plugins:
    """What the settings name: scheduler, regularizers, sampler and observers."""

    def __init__(self, config: TrainConfig) -> None:
        self.scheduler = create("scheduler", config.scheduler, LRScheduler)
        self.regularizers = [create("regularizer", s, Regularizer) for s in config.regularizers]
        self.sampler = create("sampler", config.sample_sampler, Sampler)
        self.observers = [
            create("training-observer", s, TrainingObserver) for s in config.observers
        ]
        names = [one.name for one in self.regularizers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise OptionError(f"the regularizer {twice[0]} is given twice")


class _NextToken(nn.Module):
    """From tokens to what is minimized in one forward pass, for what wraps and compiles modules.

    That is the cross entropy and, in training, what `regularized` makes of it; not `chunked`, it
    is the logits.
    """

    def __init__(self, model: GPT, *, chunked: bool, regularized: Objective | None) -> None:
        super().__init__()
        self.model = model
        self._chunked, self._regularized = chunked, regularized

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden: Tensor = self.model(ids)
        if not self._chunked:
            return self.model.logits(hidden)
        return chunked_loss(
            hidden.flatten(0, 1),
            self.model.head.weight,
            targets.flatten(),
            self._regularized if self.model.training else None,
        )


def _looks(regularizer: Regularizer) -> bool:
    """Whether it changes the loss, or adds a penalty."""
    kind = type(regularizer)
    return kind.loss is not Regularizer.loss or kind.penalty is not Regularizer.penalty


def _has_plain_head(model: GPT) -> bool:
    """Whether logits are a product with the head's weights and no more; a plug-in may change it."""
    head = model.head
    return type(head) is Linear and head.bias is None and type(model).logits is GPT.logits


def _added(
    regularizers: Iterable[Regularizer], model: GPT, loss: Tensor, logits: Tensor, targets: Tensor
) -> Tensor:
    """The loss with what some regularizers make of it and add to it."""
    objective = loss
    for regularizer in regularizers:
        changed = regularizer.loss(objective, logits, targets)
        objective = expect(regularizer, "loss", changed, Tensor, "a tensor, the loss")
    for regularizer in regularizers:
        more = regularizer.penalty(model, logits, targets)
        objective = objective + expect(
            regularizer, "penalty", more, (Tensor, Real), "a tensor or a number"
        )
    return objective


def _recomputed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """A block's forward pass whose activations are computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return recomputing(forward, *args, use_reentrant=False)  # type: ignore[no-any-return]


def _model_and_tokenizer(config: TrainConfig, processes: Processes) -> tuple[GPT, Tokenizer | None]:
    """The model to train, in float32 on its device, and the tokenizer for its data."""
    device = resolve_device(processes.device(config.device))
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if config.model is not None:
        checkpoint = load_checkpoint(config.model)
        if tokenizer is None and checkpoint.tokenizer is not None:
            tokenizer = checkpoint.tokenizer()
        return build_model(checkpoint, device, torch.float32), tokenizer
    tokenizer = tokenizer or load_tokenizer("bytes")
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        model = GPT(config.new_model_config(tokenizer.encoding.n_vocab))
    return model.to(device), tokenizer


@contextmanager
def _room_for_model() -> Iterator[None]:
    """Say so where memory does not hold a model and its optimizer's state."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory for the model; take a smaller one (width, n_layers) or another device"
        ) from None


def _key(seed: int, step: int, rank: int) -> int:
    """The seed of one process's random numbers in one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _warn(line: str) -> None:
    print(f"gptk: {line}", file=sys.stderr)
