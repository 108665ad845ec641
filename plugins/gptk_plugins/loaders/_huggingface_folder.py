"""A Hugging Face directory, here or on the hub: its tensors and its tokenizer."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

import gptk
from gptk.plugins import Fields, read_json, shown, suggest
from gptk_plugins.loaders._tensor_readers import safetensors_readers


def is_hub_id(source: str) -> bool:
    """Whether a text may name a model on the hub: owner/name, or a name alone, as gpt2's."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", source, re.ASCII)) and not source.endswith(
        (".gguf", ".pt", ".pth", ".safetensors", ".json", ".bin", ".txt", ".py")
    )


def download(hub_id: str, revision: str | None) -> Path:
    if not is_hub_id(hub_id):
        raise gptk.SourceError(f"{hub_id}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
            # Subfolders have other formats, and consolidated files the same weights again.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # the hub's client also raises errors of its HTTP library
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        loaders = suggest(hub_id, gptk.plugins.provided("loader"), what="loaders")
        raise gptk.SourceError(
            f"no model at {hub_id!r}: no such file or directory, no loader of that name, and not "
            f"available from the Hugging Face hub: {reason.rstrip('.')}; {loaders}"
        ) from None
    return Path(folder)


class _Index(Fields):
    """model.safetensors.index.json: the file that each tensor is in."""

    weight_map: dict[str, str]


def tensor_readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Readers for the tensors in model.safetensors, or in the shards that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return safetensors_readers(single)
    if not os.path.lexists(index):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        instead = f"{pickles[0]} is a pickle, which gptk does not open; " if pickles else ""
        raise gptk.SourceError(
            f"{folder} has no model.safetensors; {instead}save it as safetensors "
            "(model.save_pretrained of transformers does)"
        )
    shard_of = _Index.parse(read_json(index), index).weight_map
    readers: dict[str, Callable[[], Tensor]] = {}
    for shard in sorted(set(shard_of.values())):
        # Links are followed, as those of the hub's cache must be; names that lead elsewhere aren't.
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise gptk.SourceError(
                f"{index} names the shard {shown(shard)}; shards are files in the same directory"
            )
        if not os.path.lexists(folder / shard):
            raise gptk.SourceError(f"{folder}: the shard {shard} is missing")
        found = safetensors_readers(folder / shard)
        if twice := sorted(found.keys() & readers.keys()):
            raise gptk.SourceError(f"{folder}: the tensor {twice[0]} is in two shards")
        if absent := sorted(x for x in shard_of if shard_of[x] == shard and x not in found):
            raise gptk.SourceError(f"{folder}: the shard {shard} has no tensor {absent[0]}")
        readers |= found
    return readers


def tokenizer_maker(folder: Path) -> Callable[[], gptk.Tokenizer] | None:
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return None

    def tokenizer() -> gptk.Tokenizer:
        from gptk_plugins.tokenizers.huggingface import load_tokenizer_json

        return load_tokenizer_json(path)

    return tokenizer
