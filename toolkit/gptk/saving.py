"""Writing a gptk checkpoint: a directory that is there whole or not at all.

    gptk.json            format version, configuration, what is known of the tokenizer
    model.safetensors    the tensors by the names of gptk.GPT, a tied head once
    tokenizer.tiktoken   the tokenizer's byte sequences in base64 with their ranks, a line each

The weight loader `gptk` reads it.
"""

import base64
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptk.errors import SourceError

if TYPE_CHECKING:
    import tiktoken

    from gptk.model import GPT
    from gptk.tokenizer import Tokenizer

FORMAT_VERSION = 1
FILES = ("gptk.json", "model.safetensors", "tokenizer.tiktoken")


def save_checkpoint(
    path: str | os.PathLike[str], model: "GPT", tokenizer: "Tokenizer | None"
) -> None:
    """Write a model and its tokenizer to the directory `path`, in the model's precision.

    All is written beside `path` and synced to disk first, then renamed; a gptk checkpoint that
    is there is replaced. Raises SourceError if `path` is anything else, or cannot be written.
    """
    target = Path(path).resolve()
    _check_replaceable(target)
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        _write_files(new, model, tokenizer)
        for file in (*new.iterdir(), new):
            _sync(file)
        _replace(target, new)
        _sync(target.parent)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    """Nothing there, an empty directory, or a checkpoint and nothing else."""
    if not target.exists():
        return
    found = {one.name for one in target.iterdir()} if target.is_dir() else {target.name}
    if found and (not target.is_dir() or "gptk.json" not in found):
        raise SourceError(f"{target} is there and is no gptk checkpoint; it is not overwritten")
    if others := sorted(found - set(FILES)):
        raise SourceError(
            f"{target} holds more than a gptk checkpoint ({', '.join(others[:3])}); "
            "it is not overwritten"
        )


def _write_files(folder: Path, model: "GPT", tokenizer: "Tokenizer | None") -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied_head:
        del tensors["head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about: dict[str, Any] = {
        "format": "gptk",
        "version": FORMAT_VERSION,
        "config": dataclasses.asdict(model.config),
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


def _ranks(encoding: "tiktoken.Encoding") -> bytes:
    """tiktoken's file format: a byte sequence in base64 and its rank on each line."""
    ranks: Mapping[bytes, int] = encoding._mergeable_ranks
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def _replace(target: Path, new: Path) -> None:
    """Put `new` in the place of `target`; what was there goes only once `new` stands there."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_suffix(".old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written; directories can't be synced on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
