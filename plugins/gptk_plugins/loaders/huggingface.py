"""Hugging Face checkpoints: a directory with config.json and safetensors, or one on the hub."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import Field
from torch import Tensor

import gptk
from gptk.plugins import Fields, read_json, shown, suggest
from gptk_plugins.loaders._huggingface_config import read_config
from gptk_plugins.loaders._huggingface_tensors import LAYOUTS
from gptk_plugins.loaders._tensor_readers import (
    dtype_names,
    safetensors_readers,
    tie_equal_head,
)

# Causal masks and rotary frequencies, which some versions of transformers stored.
_BUFFERS = re.compile(r"(.*\.)?(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")


class HuggingFace(gptk.WeightLoader):
    """A Hugging Face directory or hub id, of GPT-2, Llama, Gemma and others, in safetensors."""

    name = "huggingface"
    example = "path=openai-community/gpt2"
    positional = "path"

    path: str = Field(description="a directory, or a hub id such as openai-community/gpt2")
    revision: str | None = Field(None, description="a branch, tag or commit on the hub")

    @classmethod
    def matches(cls, source: str) -> bool:
        return os.path.isfile(os.path.join(source, "config.json"))

    @classmethod
    def fetches(cls, source: str) -> bool:
        # OWNER/NAME where OWNER is a directory here is a misspelt path.
        return _is_hub_id(source) and not os.path.isdir(source.partition("/")[0])

    def load(self) -> gptk.Checkpoint:
        here = os.path.isdir(self.path)
        folder = Path(self.path) if here else _download(self.path, self.revision)
        source = self.path
        raw = read_json(folder / "config.json")
        config, notes = read_config(raw, source)
        readers = _readers(folder)
        tensors = gptk.Tensors(readers, source)
        tensors.drop([name for name in tensors if _BUFFERS.fullmatch(name)])
        layout = LAYOUTS[raw["model_type"]]
        names = layout.names_in(tensors)
        if config.tied_head and f"{names['embed']}.weight" not in tensors:
            names["embed"] = names["head"]  # one matrix, stored by its other name
        # A head stored although the config ties it is used if it is not equal to the embedding.
        stored_head = config.tied_head and f"{names['head']}.weight" in tensors
        stored_head = stored_head and names["embed"] != names["head"]
        if stored_head:
            config = replace(config, tied_head=False)
        stored = dtype_names(readers[name]() for name in tensors)
        state = tensors.assemble(config, names, layout.change and layout.change(config))
        if stored_head:
            config, state = tie_equal_head(config, state)
            if not config.tied_head:
                notes["head"] = "untied, as stored, though config.json has tie_word_embeddings"
        notes = {"format": "Hugging Face", "stored as": stored, **notes}
        return gptk.Checkpoint(config, state, _tokenizer(folder), source, notes, folder)


def _is_hub_id(source: str) -> bool:
    """Whether a text may name a model on the hub: owner/name, or a name alone, as gpt2's."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", source, re.ASCII)) and not source.endswith(
        (".gguf", ".pt", ".pth", ".safetensors", ".json", ".bin", ".txt", ".py")
    )


def _download(hub_id: str, revision: str | None) -> Path:
    if not _is_hub_id(hub_id):
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


def _readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
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


def _tokenizer(folder: Path) -> Callable[[], gptk.Tokenizer] | None:
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return None

    def tokenizer() -> gptk.Tokenizer:
        from gptk_plugins.tokenizers.huggingface import load_tokenizer_json

        return load_tokenizer_json(path)

    return tokenizer
