"""gptk's own checkpoints; `gptk.weights.saving` describes the format and writes it."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

import gptk
from gptk_plugins.loaders._tensor_readers import dtype_names, safetensors_readers

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
        if not (folder / "gptk.json").exists():
            folder = gptk.best_checkpoint(folder) or folder
            if (folder / "averaged").is_dir():  # it was chosen by the averaged weights' loss
                folder = folder / "averaged"
        about = _read_about(folder)
        try:
            config = gptk.GPTConfig(**about["config"])
        except (KeyError, TypeError) as error:
            raise gptk.SourceError(f"{folder}/gptk.json: wrong configuration: {error}") from None
        readers = safetensors_readers(folder / "model.safetensors")
        state = gptk.Tensors(readers, str(folder)).assemble(config, {})
        stored: dict[str, Any] | None = about.get("tokenizer")

        def tokenizer() -> gptk.Tokenizer:
            return _read_tokenizer(folder / "tokenizer.tiktoken", stored or {})

        notes = {
            "format": f"gptk {about['version']}",
            "stored as": dtype_names(read() for read in readers.values()),
        }
        return gptk.Checkpoint(
            config, state, tokenizer if stored is not None else None, str(folder), notes
        )


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "gptk.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise gptk.SourceError(f"{folder} is no gptk checkpoint: it has no gptk.json") from None
    except (OSError, ValueError) as error:
        raise gptk.SourceError(f"{path} cannot be read: {error}") from None
    if not isinstance(about, dict) or about.get("format") != "gptk":
        raise gptk.SourceError(f"{path} does not describe a gptk checkpoint")
    if about.get("version") != _VERSION:
        raise gptk.SourceError(
            f"{folder} has format version {about.get('version')}; this gptk reads {_VERSION}"
        )
    return about


def _read_tokenizer(path: Path, stored: Mapping[str, Any]) -> gptk.Tokenizer:
    fields = dict(stored)
    try:
        ranks = {}
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        encoding = gptk.ByteLevelBPE(
            fields.pop("name"),
            pat_str=fields.pop("pattern"),
            mergeable_ranks=ranks,
            special_tokens=fields.pop("special_tokens"),
            decode_only={
                int(number): base64.b64decode(token, validate=True)
                for number, token in fields.pop("decode_only").items()
            },
        )
        fields["eos"] = tuple(fields.get("eos", ()))
        return gptk.Tokenizer(encoding, **fields)
    except FileNotFoundError:
        raise gptk.TokenizerError(f"{path}: there is no such file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise gptk.TokenizerError(f"{path} is damaged: {error}") from None
