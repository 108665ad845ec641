"""Hugging Face checkpoints: a directory with config.json and safetensors, or one on the hub."""

import os
import re
from dataclasses import replace
from pathlib import Path

from pydantic import Field

import gptk
from gptk.plugins import read_json
from gptk_plugins.loaders import transformers
from gptk_plugins.loaders._huggingface_config import is_known, read_config
from gptk_plugins.loaders._huggingface_folder import (
    download,
    is_hub_id,
    tensor_readers,
    tokenizer_maker,
)
from gptk_plugins.loaders._huggingface_tensors import LAYOUTS
from gptk_plugins.loaders._tensor_readers import dtype_names, tie_equal_head

# Causal masks and rotary frequencies, which some versions of transformers stored.
_BUFFERS = re.compile(r"(.*\.)?(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")


class HuggingFace(gptk.WeightLoader):
    """A Hugging Face directory or hub id, of GPT-2, Llama, Gemma and others, in safetensors; of
    families that gptk has no code for, by the loader transformers."""

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
        return is_hub_id(source) and not os.path.isdir(source.partition("/")[0])

    def load(self) -> gptk.Checkpoint:
        here = os.path.isdir(self.path)
        folder = Path(self.path) if here else download(self.path, self.revision)
        source = self.path
        raw = read_json(folder / "config.json")
        if not is_known(raw) and transformers.has_class_for(raw):
            return transformers.checkpoint_of(folder, source)
        config, notes = read_config(raw, source)
        readers = tensor_readers(folder)
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
        return gptk.Checkpoint(config, state, tokenizer_maker(folder), source, notes, folder)
