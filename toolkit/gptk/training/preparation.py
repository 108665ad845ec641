"""What a run begins with: the model, its tokenizer and the windows, all as the settings say."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gptk.data.token_files import prepare_tokens
from gptk.data.windows import Windows
from gptk.errors import OptionError, TrainingError
from gptk.model.config import GPTConfig
from gptk.model.gpt import GPT
from gptk.runs.checkpoints import STATE, SavedProgress, read_progress
from gptk.runs.directory import CONFIG, RunDirectory
from gptk.system.devices import resolve_device
from gptk.system.memory import physical_memory
from gptk.text.tokenizer import Tokenizer
from gptk.training.config import DATA, FIXED, TrainConfig, read_config
from gptk.training.plugins import TrainingPlugins
from gptk.training.processes import Processes
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk.weights.tokenizers import load_tokenizer


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
    progress: SavedProgress | None = None
    """What the checkpoint's training.json holds."""


def prepare_new(config: TrainConfig, run: Path | None) -> Prepared:
    """For `Trainer.start`. Mistakes in plug-ins' specs raise before any work."""
    TrainingPlugins.create(config)  # only to check the specs
    processes = Processes.join(config.device)
    if run is not None:
        RunDirectory(run).check_new()
    model, tokenizer = _first_model(config, processes)
    return _with_data(model, tokenizer, config, processes)


def prepare_resumed(
    directory: RunDirectory, changes: Iterable[str], warn: Callable[[str], None]
) -> Prepared:
    """For `Trainer.resume`. Claims the directory. warn: gets a line for each damaged checkpoint and
    for changed data."""
    run = directory.path
    path = run / CONFIG
    if not path.is_file():
        raise TrainingError(f"{run} is not a training run: it has no {CONFIG}")
    config = read_config(path, changes)
    processes = Processes.join(config.device)
    # The newest checkpoint is the same in every process.
    newest = directory.resume(warn) if processes.main else run
    folder = Path(processes.broadcast(str(newest)))
    saved = read_progress(folder)
    before = _saved_settings(saved, folder)
    _check_unchanged(config, before, folder, FIXED)
    checkpoint = load_checkpoint(str(folder))
    tokenizer = checkpoint.tokenizer() if checkpoint.tokenizer else None
    device = resolve_device(processes.device(config.device))
    model = build_model(checkpoint, device, torch.float32)
    prepared = _with_data(model, tokenizer, config, processes)
    if saved.data not in (None, prepared.data_sums):
        _check_unchanged(config, before, folder, DATA)
        if processes.main:
            warn(f"the data is not what {run} was trained on up to here")
    return replace(prepared, checkpoint=folder, progress=saved)


def _saved_settings(saved: SavedProgress, folder: Path) -> TrainConfig:
    """The settings that a checkpoint was trained with."""
    try:
        return TrainConfig(**saved.settings)
    except OptionError as error:
        raise TrainingError(f"{folder / STATE} has wrong settings: {error}") from None


def _check_unchanged(
    config: TrainConfig, before: TrainConfig, folder: Path, names: Iterable[str]
) -> None:
    """Raise OptionError if one of the settings differs from that of the checkpoint in `folder`."""
    for name in names:
        now, then = (json.dumps(getattr(c, name), ensure_ascii=False) for c in (config, before))
        if now != then:
            raise OptionError(
                f"{name}={now} cannot change in a run that goes on: {folder} was trained with "
                f"{name}={then}; set it back, or begin another run"
            )


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
    shape = config.new_model_config(tokenizer.encoding.n_vocab)
    _check_size(shape)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        model = GPT(shape)
    return model.to(device), tokenizer


def _check_size(shape: GPTConfig) -> None:
    """Raise MemoryError for a model that takes more memory than the machine has.

    The system would rather end the process than refuse so many small pieces of memory.
    """
    heads = 2 * (shape.n_heads + shape.n_kv_heads)  # queries and output, keys and values
    matrices = 3 if shape.mlp == "swiglu" else 2
    block = shape.width * (heads * shape.head_dim + matrices * shape.mlp_width)
    parameters = shape.vocab_size * shape.width + shape.n_layers * block
    if 4 * parameters + _BLOCK * shape.n_layers > physical_memory():
        raise MemoryError


_BLOCK = 50_000
"""Bytes that the modules of a block take besides their weights, about."""


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
