"""Saving models in gptk's own format, a directory of three files, which the loader `gptk` reads.

    gptk.json                 format version, configuration, the tokenizer's settings
    model.safetensors         the tensors by the names of gptk.GPT, a tied head once
    tokenizer.tiktoken        the tokenizer's byte sequences in base64 with their ranks, a line each
    tokenizer-pipeline.json   instead of it, for a gptk.PipelineEncoding: a `tokenizer.json`

How the directory is written, atomically, is in gptk.system.files.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptk.errors import SourceError
from gptk.system.files import write_directory

if TYPE_CHECKING:
    import tiktoken
    from torch import Tensor

    from gptk.model.config import GPTConfig
    from gptk.text.pipeline import PipelineEncoding
    from gptk.text.tokenizer import Tokenizer

FORMAT_VERSION = 1
FILES = ("gptk.json", "model.safetensors", "tokenizer.tiktoken", "tokenizer-pipeline.json")


def save_checkpoint(
    path: str | os.PathLike[str], model: object, tokenizer: "Tokenizer | None"
) -> None:
    """Write a model and its tokenizer to the directory `path`, in the model's precision.

    The files are written to another directory, synced to disk, and then renamed; a gptk checkpoint
    at `path` is replaced. Raises SourceError if something else is at `path`, if it cannot be
    written, or if the model is no gptk.GPT.
    """
    from gptk.model.gpt import GPT

    if not isinstance(model, GPT):
        raise SourceError(f"gptk's format holds a gptk.GPT, not a {type(model).__name__}")
    write_directory(
        path,
        lambda folder: write_model(folder, model.config, model.state_dict(), tokenizer),
        what="gptk checkpoint",
        files=FILES,
    )


def write_model(
    folder: Path,
    config: "GPTConfig",
    state: "Mapping[str, Tensor]",
    tokenizer: "Tokenizer | None",
) -> None:
    """Write gptk's three files into an existing directory, without syncing them to disk.

    state: the tensors by the names of gptk.GPT, on any device; a tied `head.weight` is left out.
    Raises OSError or SafetensorError, for a full disk for example.
    """
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if not (config.tied_head and name == "head.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about: dict[str, Any] = {
        "format": "gptk",
        "version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "tokenizer": None,
    }
    if tokenizer is not None:
        about["tokenizer"] = _write_encoding(folder, tokenizer.encoding) | {
            field.name: getattr(tokenizer, field.name)
            for field in dataclasses.fields(tokenizer)
            if field.name != "encoding"
        }
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    (folder / "gptk.json").write_text(text, encoding="utf-8")
    # safetensors creates files that only their owner can read; give it the mode of the others.
    (folder / "model.safetensors").chmod((folder / "gptk.json").stat().st_mode)


def _write_encoding(
    folder: Path, encoding: "tiktoken.Encoding | PipelineEncoding"
) -> dict[str, Any]:
    """Write the file of an encoding. Returns what gptk.json says about it."""
    from gptk.text.pipeline import PipelineEncoding

    if isinstance(encoding, PipelineEncoding):
        (folder / "tokenizer-pipeline.json").write_text(encoding.to_json(), encoding="utf-8")
        return {
            "name": encoding.name,
            "splits_special_tokens": encoding.splits_special_tokens,
        }
    from gptk.text.encoding import ByteLevelBPE

    encoding = ByteLevelBPE.of(encoding)
    (folder / "tokenizer.tiktoken").write_bytes(_ranks(encoding))
    return {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        # Tokens that are decoded but never encoded, by id, in base64: see gptk.ByteLevelBPE.
        "decode_only": {
            number: base64.b64encode(token).decode()
            for number, token in encoding.decode_only.items()
        },
    }


def _ranks(encoding: "tiktoken.Encoding") -> bytes:
    """tiktoken's file format: a byte sequence in base64 and its rank on each line."""
    ranks: Mapping[bytes, int] = encoding._mergeable_ranks
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)
