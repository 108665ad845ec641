"""Writing models: directories that are there whole or not at all, and gptk's own format.

    gptk.json            format version, configuration, what is known of the tokenizer
    model.safetensors    the tensors by the names of gptk.GPT, a tied head once
    tokenizer.tiktoken   the tokenizer's byte sequences in base64 with their ranks, a line each

The weight loader `gptk` reads it.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptk.system.files import write_directory

if TYPE_CHECKING:
    import tiktoken
    from torch import Tensor

    from gptk.model.config import GPTConfig
    from gptk.model.gpt import GPT
    from gptk.text.tokenizer import Tokenizer

FORMAT_VERSION = 1
FILES = ("gptk.json", "model.safetensors", "tokenizer.tiktoken")


def save_checkpoint(
    path: str | os.PathLike[str], model: "GPT", tokenizer: "Tokenizer | None"
) -> None:
    """Write a model and its tokenizer to the directory `path`, in the model's precision.

    All is written beside `path` and synced to disk first, then renamed; a gptk checkpoint that
    is there is replaced. Raises SourceError if `path` is anything else, or cannot be written.
    """
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
    """Write gptk's three files into a directory that is there; nothing is synced.

    state: the tensors by the names of gptk.GPT, on any device; `head.weight` counts only where
    the head is not tied. Raises OSError or SafetensorError, for a full disk for example.
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
        encoding = tokenizer.encoding
        about["tokenizer"] = {
            "name": encoding.name,
            "pattern": encoding._pat_str,
            "special_tokens": encoding._special_tokens,
            # Tokens that no text is encoded to, by id, in base64; see the plug-ins' ByteLevelBPE.
            "decode_only": {
                number: base64.b64encode(token).decode()
                for number, token in getattr(encoding, "decode_only", {}).items()
            },
            **{
                field.name: getattr(tokenizer, field.name)
                for field in dataclasses.fields(tokenizer)
                if field.name != "encoding"
            },
        }
        (folder / "tokenizer.tiktoken").write_bytes(_ranks(encoding))
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    (folder / "gptk.json").write_text(text, encoding="utf-8")
    # Safetensors' files are their owner's alone; they shall be whose the others are.
    (folder / "model.safetensors").chmod((folder / "gptk.json").stat().st_mode)


def _ranks(encoding: "tiktoken.Encoding") -> bytes:
    """tiktoken's file format: a byte sequence in base64 and its rank on each line."""
    ranks: Mapping[bytes, int] = encoding._mergeable_ranks
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)
