"""What a run begins with: the model, its tokenizer and the windows, all as the settings say."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch

from gptk.data.token_files import prepare_tokens
from gptk.data.windows import Windows
from gptk.errors import OptionError, TrainingError
from gptk.model.gpt import GPT
from gptk.runs import checkpoints
from gptk.runs.directory import CONFIG, lock_run
from gptk.runs.metrics import METRICS
from gptk.system.devices import resolve_device
from gptk.text.tokenizer import Tokenizer
from gptk.training.config import TrainConfig, read_config
from gptk.training.plugins import TrainingPlugins
from gptk.training.processes import Processes
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk.weights.tokenizers import load_tokenizer

# Settings that shape the weights: a resumed run cannot change them.
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


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a trainer is made of, and the checkpoint to resume from, if any."""

    config: TrainConfig
    processes: Processes
    model: GPT
    """In float32, on the device to train on."""
    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    data_sums: list[str]
    """The SHA-256 of each token file that the windows are in."""
    checkpoint: Path | None = None
    lock: IO[bytes] | None = None
    """Of the run directory, in the main process."""


def prepare_new(config: TrainConfig, run: Path | None) -> Prepared:
    """For `Trainer.start`. Mistakes in plug-ins' specs raise before any work."""
    TrainingPlugins.create(config)  # only to check the specs
    processes = Processes.join(config.device)
    if run is not None:
        _check_new(run)
    model, tokenizer = _first_model(config, processes)
    return _with_data(model, tokenizer, config, processes)


def prepare_resumed(run: Path, changes: Iterable[str], warn: Callable[[str], None]) -> Prepared:
    """For `Trainer.resume`. The run stays locked."""
    config = _resumed_config(run, changes)
    processes = Processes.join(config.device)
    lock = lock_run(run) if processes.main else None
    folder = _newest_checkpoint(run, processes, warn)
    checkpoint = load_checkpoint(str(folder))
    tokenizer = checkpoint.tokenizer() if checkpoint.tokenizer else None
    device = resolve_device(processes.device(config.device))
    model = build_model(checkpoint, device, torch.float32)
    prepared = _with_data(model, tokenizer, config, processes)
    return replace(prepared, checkpoint=folder, lock=lock)


def _check_new(run: Path) -> None:
    """Raise TrainingError unless a new run may begin in a directory, which need not exist."""
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run} is a file; a run needs a directory")
    if checkpoints.best_checkpoint(run):
        raise TrainingError(
            f"{run} holds a run already; go on with it (--resume {run}) or name another"
        )
    # A run that was killed before its first checkpoint has metrics, and may begin anew.
    if (run / CONFIG).exists() and not (run / METRICS).exists():
        raise TrainingError(f"{run} has a {CONFIG} of its own; name another directory")


def _first_model(config: TrainConfig, processes: Processes) -> tuple[GPT, Tokenizer | None]:
    """The model that a new run trains, and the tokenizer of its data."""
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


def _resumed_config(run: Path, changes: Iterable[str]) -> TrainConfig:
    """The settings of a run to resume, with `key=value` changes."""
    path = run / CONFIG
    if not path.is_file():
        raise TrainingError(f"{run} is not a training run: it has no {CONFIG}")
    before, config = read_config(path), read_config(path, changes)
    if fixed := {key for key in _FIXED if getattr(config, key) != getattr(before, key)}:
        raise OptionError(f"{', '.join(sorted(fixed))} cannot change in a run that goes on")
    return config


def _newest_checkpoint(run: Path, processes: Processes, warn: Callable[[str], None]) -> Path:
    """The checkpoint to resume from, the same in every process."""
    newest = None
    if processes.main:
        checkpoints.clean(run)
        newest = checkpoints.newest_intact(run, warn)
    newest = processes.broadcast(newest)
    assert newest is not None
    return newest


def _with_data(
    model: GPT, tokenizer: Tokenizer | None, config: TrainConfig, processes: Processes
) -> Prepared:
    """Add windows of the data, tokenized now or before.

    Raises OptionError if model, tokenizer and settings do not fit together.
    """
    if tokenizer is None:
        raise OptionError("the model comes without a tokenizer; name one, such as tokenizer=gpt2")
    if tokenizer.encoding.max_token_value >= model.config.vocab_size:
        raise OptionError(
            f"the tokenizer has tokens up to {tokenizer.encoding.max_token_value}, the model "
            f"a vocabulary of {model.config.vocab_size}; name the tokenizer of the model"
        )
    window = model.config.context_length
    context = config.context_length or window
    if context > window:
        raise OptionError(f"context_length={context} is more than the model's {window}")
    # One process writes the token files; the others then find them.
    for main_turn in (True, False):
        if processes.main == main_turn:
            train, validation, sums = _tokens(config, tokenizer)
        processes.barrier()
    return Prepared(
        config,
        processes,
        model,
        tokenizer,
        Windows(train, context, config.stride),
        Windows(validation, context),
        sums,
    )


def _tokens(config: TrainConfig, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokens to train on, tokens to validate on, and the SHA-256 of each of their files."""
    data = prepare_tokens(config.data, tokenizer)
    if not config.validation_data:
        return *data.split(config.train_ratio), [data.sha256]
    validation = prepare_tokens(config.validation_data, tokenizer)
    return data.tokens, validation.tokens, [data.sha256, validation.sha256]
