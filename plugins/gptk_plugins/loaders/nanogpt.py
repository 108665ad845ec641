"""Checkpoints of karpathy/nanoGPT: the `ckpt.pt` that its train.py writes.

A dict with the state dict as `model`, possibly of a compiled model, the configuration as
`model_args`, and the state of training. The model is GPT-2 with the exact GELU and, for
`bias=False`, without biases in linear layers and norms. Character-level datasets store their
characters in a pickle, meta.pkl, which is not opened.
"""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import gptk
from gptk.plugins import Fields
from gptk_plugins.loaders._heads import head_dim_of
from gptk_plugins.loaders._tensor_readers import dtype_names, naming, tie_equal_head
from gptk_plugins.loaders._torch_file import read_torch_file, state_readers, torch_file_contains
from gptk_plugins.tokenizers.gpt2 import GPT2

_NAMES = {
    "embed": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "blocks.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blocks.{i}.attn.qkv": "transformer.h.{i}.attn.c_attn",
    "blocks.{i}.attn.out": "transformer.h.{i}.attn.c_proj",
    "blocks.{i}.mlp_norm": "transformer.h.{i}.ln_2",
    "blocks.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
    "blocks.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_GPT2_SIZES = (50257, 50304)  # GPT-2's own, and padded to a multiple of 64


class NanoGPT(gptk.WeightLoader):
    """A checkpoint of nanoGPT: ckpt.pt."""

    name = "nanogpt"
    example = "path=out/ckpt.pt"
    positional = "path"

    path: str = Field(description="the file")
    gelu: Literal["exact", "tanh"] = Field(
        "exact", description="tanh for checkpoints of nanoGPT from before 17 May 2023"
    )

    @classmethod
    def matches(cls, source: str) -> bool:
        # A whole model instead of its state dict has the same names, but apart; `load` explains.
        return any(
            torch_file_contains(source, *names)
            for names in (
                (b"transformer.wte.weight", b"model_args"),
                (b"transformer", b"wte", b"wpe", b"c_attn"),
            )
        )

    def load(self) -> gptk.Checkpoint:
        found = read_torch_file(Path(self.path))
        arguments, weights = found.get("model_args"), found.get("model")
        if not isinstance(arguments, dict) or not isinstance(weights, dict):
            raise gptk.SourceError(
                f"{self.path} is not nanoGPT's ckpt.pt: it has no model and model_args"
            )
        readers = state_readers(weights, self.path)
        tensors = gptk.Tensors(readers, self.path)
        # Causal masks, stored by runs whose PyTorch lacked scaled_dot_product_attention.
        tensors.drop(
            [name for name in tensors if re.fullmatch(r"transformer\.h\.\d+\.attn\.bias", name)]
        )
        # nanoGPT's head is the embedding, and stored by both names; one of them may be missing.
        names = dict(_NAMES)
        if "transformer.wte.weight" not in tensors:
            names["embed"] = names["head"]
        tied = "lm_head.weight" not in tensors or names["embed"] == names["head"]
        config = self._config(arguments, tied_head=tied)
        stored = dtype_names(readers[name]() for name in tensors)
        config, state = tie_equal_head(config, tensors.assemble(config, names))
        return gptk.Checkpoint(
            config,
            state,
            GPT2().load if config.vocab_size in _GPT2_SIZES else None,
            self.path,
            {"format": "nanoGPT", "stored as": stored},
        )

    def _config(self, raw: dict[Any, Any], *, tied_head: bool) -> gptk.GPTConfig:
        fields = _Arguments.parse(raw, f"{self.path}: model_args")
        with naming(self.path):
            return gptk.GPTConfig(
                vocab_size=fields.vocab_size,
                context_length=fields.block_size,
                width=fields.n_embd,
                n_layers=fields.n_layer,
                n_heads=fields.n_head,
                n_kv_heads=fields.n_head,
                head_dim=head_dim_of(fields.n_embd, fields.n_head),
                mlp_width=4 * fields.n_embd,
                norm_bias=fields.bias,
                mlp="gelu" if self.gelu == "exact" else "gelu-tanh",
                mlp_bias=fields.bias,
                qkv_bias=fields.bias,
                out_bias=fields.bias,
                tied_head=tied_head,
            )


class _Arguments(Fields):
    """model_args, by which train.py makes the model."""

    n_layer: int = Field(ge=1)
    n_head: int = Field(ge=1)
    n_embd: int = Field(ge=1)
    block_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    bias: bool = True
