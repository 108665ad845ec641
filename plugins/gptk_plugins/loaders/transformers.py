"""Hugging Face directories of any causal language model that transformers has a class for.

The model is transformers' own; gptk gives it its attention and its cache, see
`gptk.TransformersModel`. Code from a model's directory is never run.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk.plugins import read_json, shown
from gptk_plugins.loaders._huggingface_folder import download, tensor_readers, tokenizer_maker
from gptk_plugins.loaders._tensor_readers import dtype_names


class Transformers(gptk.WeightLoader):
    """Any causal language model of transformers', in its own code, from safetensors.

    The loader huggingface calls it for families that gptk has no code for. Named by its spec, it
    also runs those that gptk has.
    """

    name = "transformers"
    example = "path=models/granite-3"
    positional = "path"

    path: str = Field(
        description="a directory, or a hub id such as ibm-granite/granite-3.3-2b-base"
    )
    revision: str | None = Field(None, description="a branch, tag or commit on the hub")

    def load(self) -> gptk.Checkpoint:
        here = os.path.isdir(self.path)
        return checkpoint_of(
            Path(self.path) if here else download(self.path, self.revision), self.path
        )


def has_class_for(raw: Mapping[str, Any]) -> bool:
    """Whether transformers is installed and has a class for a config.json's model type that
    predicts tokens."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def checkpoint_of(folder: Path, source: str) -> gptk.Checkpoint:
    """The model in a directory. Raises SourceError."""
    try:
        import transformers
    except ImportError:
        raise gptk.SourceError(
            f"{source}: to run it by transformers, install that: "
            f"{gptk.distribution.install_command('transformers')}"
        ) from None
    raw = read_json(folder / "config.json")
    if not has_class_for(raw):
        raise gptk.SourceError(
            f"{source}: transformers {transformers.__version__} has no causal language model of "
            f"the type {shown(raw.get('model_type'))}"
        )
    if raw.get("quantization_config") is not None:
        raise gptk.SourceError(
            f"{source} is quantized (quantization_config), which gptk does not run by transformers"
        )
    if os.path.lexists(folder / "adapter_config.json"):
        raise gptk.SourceError(f"{source} has an adapter (adapter_config.json); merge it first")
    readers = tensor_readers(folder)
    tensors = {name: read() for name, read in readers.items()}
    notes = {
        "format": "Hugging Face, run by transformers",
        "stored as": dtype_names(tensors.values()),
        "model type": str(raw["model_type"]),
    }
    return gptk.Checkpoint(
        config=None,
        state=tensors,
        tokenizer=tokenizer_maker(folder),
        source=source,
        notes=notes,
        path=folder,
        make_model=_maker(folder, source, tensors),
    )


def _maker(
    folder: Path, source: str, tensors: Mapping[str, Tensor]
) -> Callable[[torch.device, torch.dtype], gptk.CausalModel]:
    stored = sum(tensor.numel() for tensor in tensors.values())
    names = len(tensors)

    def make_model(device: torch.device, dtype: torch.dtype) -> gptk.CausalModel:
        with _as_one_line(source), _quiet():
            module = _module(folder, source, dtype, names, stored).to(device)
        return gptk.TransformersModel(module)

    return make_model


def _module(folder: Path, source: str, dtype: torch.dtype, names: int, stored: int) -> Any:
    """The model, with all tensors of its files. Raises SourceError if these do not fit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    models: Any = AutoModelForCausalLM  # its methods have no types
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **local)
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= names:
        raise gptk.SourceError(f"{source}: {shown(layers)} layers, and {names} tensors")
    with torch.device("meta"):
        empty = models.from_config(config, attn_implementation="eager", trust_remote_code=False)
    # What a file lacks would be made up, in memory, before anyone could say so.
    needed = sum(math.prod(parameter.shape) for parameter in empty.parameters())
    if needed > 2 * stored:
        raise gptk.SourceError(
            f"{source}: config.json describes {needed:,} numbers, and the files have {stored:,}"
        )
    module, found = models.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        output_loading_info=True,
        **local,
    )
    for kind, words in _PROBLEMS.items():
        if wrong := sorted(map(str, found.get(kind) or ())):
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise gptk.SourceError(f"{source}: {words} {', '.join(wrong[:5])}{more}")
    return module


@contextlib.contextmanager
def _as_one_line(source: str) -> Iterator[None]:
    """Whatever transformers raises for a directory, as a SourceError."""
    try:
        yield
    except (gptk.GptkError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, for files that are damaged
        if "allocate" in str(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise gptk.SourceError(f"{source} cannot be read by transformers: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars: what is wrong is an error here."""
    from transformers.utils import logging as theirs

    logging: Any = theirs  # its functions have no types
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_PROBLEMS = {
    "missing_keys": "the files lack the tensors",
    "mismatched_keys": "the configuration asks for other shapes of",
    "unexpected_keys": "nothing in the model uses the tensors",
    "error_msgs": "transformers says:",
}
"""What transformers tells of tensors, and how gptk says it."""
