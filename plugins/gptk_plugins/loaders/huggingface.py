"""Hugging Face checkpoints: a directory with config.json and safetensors, or one on the hub."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.loaders._huggingface_config import read_config
from gptk_plugins.loaders._tensor_readers import (
    dtype_names,
    safetensors_readers,
    tie_equal_head,
)

LLAMA_NAMES = {
    "embed": "embed_tokens",
    "blocks.{i}.attn_norm": "layers.{i}.input_layernorm",
    "blocks.{i}.attn.qkv": " ".join(f"layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    "blocks.{i}.attn.q_norm": "layers.{i}.self_attn.q_norm",
    "blocks.{i}.attn.k_norm": "layers.{i}.self_attn.k_norm",
    "blocks.{i}.attn.out": "layers.{i}.self_attn.o_proj",
    "blocks.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.up": "layers.{i}.mlp.gate_proj layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down": "layers.{i}.mlp.down_proj",
    "norm": "norm",
}
GPT2_NAMES = {
    "embed": "wte",
    "embed_positions": "wpe",
    "blocks.{i}.attn_norm": "h.{i}.ln_1",
    "blocks.{i}.attn.qkv": "h.{i}.attn.c_attn",
    "blocks.{i}.attn.out": "h.{i}.attn.c_proj",
    "blocks.{i}.mlp_norm": "h.{i}.ln_2",
    "blocks.{i}.mlp.up": "h.{i}.mlp.c_fc",
    "blocks.{i}.mlp.down": "h.{i}.mlp.c_proj",
    "norm": "ln_f",
}
# Causal masks and rotary frequencies, which some versions of transformers stored.
_BUFFERS = re.compile(r"(.*\.)?(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")


class HuggingFace(gptk.WeightLoader):
    """A Hugging Face directory or hub id: gpt2, llama, mistral, qwen2 or qwen3, safetensors."""

    name = "huggingface"
    example = "path=openai-community/gpt2"
    positional = "path"

    path: str = Field(description="a directory, or a hub id such as openai-community/gpt2")
    revision: str | None = Field(None, description="a branch, tag or commit on the hub")

    @classmethod
    def matches(cls, source: str) -> bool:
        if os.path.exists(source):
            return os.path.isfile(os.path.join(source, "config.json"))
        return _is_hub_id(source) and not os.path.isdir(source.partition("/")[0])

    def load(self) -> gptk.Checkpoint:
        path = Path(self.path)
        folder = path if path.is_dir() else _download(self.path, self.revision)
        source = self.path
        raw = _read_json(folder / "config.json")
        config, notes = read_config(raw, source)
        readers = _readers(folder)
        tensors = gptk.Tensors(readers, source)
        tensors.drop([name for name in tensors if _BUFFERS.fullmatch(name)])
        gpt2 = raw["model_type"] == "gpt2"
        table, prefix = (GPT2_NAMES, "transformer.") if gpt2 else (LLAMA_NAMES, "model.")
        names = _with_prefix(table, prefix, tensors)
        # A head stored although the config ties it is used if it is not equal to the embedding.
        stored_head = config.tied_head and "lm_head.weight" in tensors
        if stored_head:
            config = replace(config, tied_head=False)
        stored = dtype_names(readers[name]() for name in tensors)
        state = tensors.assemble(config, names, _transposed if gpt2 else None)
        if stored_head:
            config, state = tie_equal_head(config, state)
            if not config.tied_head:
                notes["head"] = "untied, as stored, though config.json has tie_word_embeddings"
        notes = {"format": "Hugging Face", "stored as": stored, **notes}
        return gptk.Checkpoint(config, state, _tokenizer(folder), source, notes, folder)


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and not source.endswith(
        (".gguf", ".pt", ".pth", ".safetensors", ".json")
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
        raise gptk.SourceError(
            f"{hub_id}: no such directory, and not available from the hub: {reason}"
        ) from None
    return Path(folder)


def _readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Readers for the tensors in model.safetensors, or in the shards that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return safetensors_readers(single)
    if not index.exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        instead = f"{pickles[0]} is a pickle, which gptk does not open; " if pickles else ""
        raise gptk.SourceError(
            f"{folder} has no model.safetensors; {instead}save it as safetensors "
            "(model.save_pretrained of transformers does)"
        )
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise gptk.SourceError(f"{index}: there is no weight_map")
    readers: dict[str, Callable[[], Tensor]] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).exists():
            raise gptk.SourceError(f"{folder}: the shard {shard} is missing")
        readers |= safetensors_readers(folder / shard)
    return readers


def _with_prefix(names: Mapping[str, str], prefix: str, tensors: gptk.Tensors) -> dict[str, str]:
    """The table with `model.` or `transformer.` before each name, if the file has it."""
    if not any(name.startswith(prefix) for name in tensors):
        prefix = ""
    table = {
        ours: " ".join(prefix + name for name in theirs.split()) for ours, theirs in names.items()
    }
    return table | {"head": "lm_head"}


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """GPT-2's linear layers are stored (in, out), as 1x1 convolutions."""
    return tensor.T.contiguous() if re.search(r"\.c_\w+\.weight$", name) else tensor


def _tokenizer(folder: Path) -> Callable[[], gptk.Tokenizer] | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None

    def tokenizer() -> gptk.Tokenizer:
        from gptk_plugins.tokenizers.huggingface import load_tokenizer_json

        return load_tokenizer_json(path)

    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise gptk.SourceError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise gptk.SourceError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise gptk.SourceError(f"{path} holds no JSON object")
    return value
