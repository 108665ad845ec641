"""gptk's own checkpoints; `gptk.weights.saving` describes the format and writes it."""

import base64
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import tiktoken
from pydantic import Field, Strict, create_model
from torch import Tensor

import gptk
from gptk.plugins import Fields, read_json, read_text, shown
from gptk_plugins.loaders._tensor_readers import dtype_names, naming, safetensors_readers

_VERSION = 1


class Gptk(gptk.WeightLoader):
    """A directory with gptk.json, or a training run, of which the best checkpoint is loaded."""

    name = "gptk"
    example = "path=checkpoint"
    positional = "path"

    path: str = Field(description="the directory")

    @classmethod
    def matches(cls, source: str) -> bool:
        if os.path.isfile(os.path.join(source, "gptk.json")):
            return True
        return os.path.isdir(source) and gptk.best_checkpoint(source) is not None

    def load(self) -> gptk.Checkpoint:
        folder = Path(self.path)
        if not os.path.lexists(folder / "gptk.json"):
            folder = gptk.best_checkpoint(folder) or folder
            if os.path.isdir(folder / "averaged"):  # it was chosen by the averaged weights' loss
                folder = folder / "averaged"
        path = folder / "gptk.json"
        gptk.check_run_file(path)
        about = _read_about(path)
        try:
            with naming(path):
                config = gptk.GPTConfig(**about.config)
        except TypeError as error:  # a name that is missing, or that GPTConfig lacks
            problem = str(error).partition("() ")[2]
            raise gptk.SourceError(f"{path}: wrong configuration: it {problem}") from None
        weights = folder / "model.safetensors"
        readers = safetensors_readers(weights)
        state = gptk.Tensors(_checked(readers, weights), str(folder)).assemble(config, {})
        stored = about.tokenizer

        def tokenizer() -> gptk.Tokenizer:
            assert stored is not None
            by_pipeline = "splits_special_tokens" in stored
            file = folder / ("tokenizer-pipeline.json" if by_pipeline else "tokenizer.tiktoken")
            gptk.check_run_file(file)
            return _read_pipeline(file, stored) if by_pipeline else _read_tokenizer(file, stored)

        notes = {
            "format": f"gptk {about.version}",
            "stored as": dtype_names(read() for read in readers.values()),
        }
        return gptk.Checkpoint(
            config, state, tokenizer if stored is not None else None, str(folder), notes
        )


def _checked(
    readers: Mapping[str, Callable[[], Tensor]], weights: Path
) -> dict[str, Callable[[], Tensor]]:
    """Readers of tensors, the first of which checks the file, so that reading a tokenizer or a
    configuration alone does not take the time."""
    check = functools.cache(gptk.check_run_file)

    def checked(read: Callable[[], Tensor]) -> Tensor:
        check(weights)
        return read()

    return {name: functools.partial(checked, read) for name, read in readers.items()}


class _Encoding(Fields):
    """What `gptk.weights.saving` stores of a tokenizer's encoding."""

    name: str
    pattern: str
    special_tokens: dict[str, int]
    decode_only: dict[str, str]


class _Pipeline(Fields):
    """The same of a gptk.PipelineEncoding."""

    name: str
    splits_special_tokens: bool


class _About(Fields):
    """gptk.json."""

    version: int
    config: dict[str, Any]
    tokenizer: dict[str, Any] | None = None


def _read_about(path: Path) -> _About:
    if not os.path.lexists(path):
        raise gptk.SourceError(f"{path.parent} is no gptk checkpoint: it has no gptk.json")
    raw = read_json(path, max_bytes=_MAX_ABOUT)
    if raw.get("format") != "gptk":
        raise gptk.SourceError(f"{path} does not describe a gptk checkpoint")
    if (version := raw.get("version")) != _VERSION:
        raise gptk.SourceError(
            f"{path} has format version {shown(version)}; this gptk reads {_VERSION}"
        )
    return _About.parse(raw, path)


_MAX_ABOUT = 1 << 26
"""Bytes: tokens that are only decoded may be many."""


def _read_tokenizer(path: Path, stored: dict[str, Any]) -> gptk.Tokenizer:
    where = path.with_name("gptk.json")
    about = _Encoding.parse(stored, f"{where}, tokenizer", gptk.TokenizerError)
    settings = _settings_type().parse(stored, f"{where}, tokenizer", gptk.TokenizerError)
    text = read_text(path, gptk.TokenizerError, max_bytes=_MAX_ABOUT)
    try:
        ranks = {}
        for line in text.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        # tiktoken panics, which is no Exception.
        if len(set(ranks.values())) < len(ranks) or len(ranks) < text.count("\n"):
            raise ValueError("a token or a rank occurs twice")
        encoding = gptk.ByteLevelBPE(
            about.name,
            pat_str=about.pattern,
            mergeable_ranks=ranks,
            special_tokens=about.special_tokens,
            decode_only={
                int(number): base64.b64decode(token, validate=True)
                for number, token in about.decode_only.items()
            },
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise gptk.TokenizerError(f"{path} is damaged: {error}") from None
    except gptk.TokenizerError as error:
        raise gptk.TokenizerError(f"{where}, tokenizer: {error}") from None
    return gptk.Tokenizer(encoding, **dict(settings))


def _read_pipeline(path: Path, stored: dict[str, Any]) -> gptk.Tokenizer:
    where = f"{path.with_name('gptk.json')}, tokenizer"
    about = _Pipeline.parse(stored, where, gptk.TokenizerError)
    settings = _settings_type().parse(stored, where, gptk.TokenizerError)
    text = read_text(path, gptk.TokenizerError, max_bytes=_MAX_ABOUT)
    encoding = gptk.PipelineEncoding.from_json(
        about.name, text, splits_special_tokens=about.splits_special_tokens
    )
    return gptk.Tokenizer(encoding, **dict(settings))


@functools.cache
def _settings_type() -> type[Fields]:
    """The fields of a gptk.Tokenizer but its encoding, with their types and defaults."""
    types = get_type_hints(gptk.Tokenizer, localns={"tiktoken": tiktoken})
    declared: dict[str, Any] = {}
    for field in dataclasses.fields(gptk.Tokenizer):
        if field.name != "encoding":
            kind = types[field.name]
            # JSON has no tuples.
            kind = Annotated[kind, Strict(False)] if get_origin(kind) is tuple else kind
            declared[field.name] = (kind, field.default)
    return create_model("_Settings", __base__=Fields, **declared)
