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
from gptk_plugins.loaders._tensor_readers import (
    dtype_names,
    read_torch_file,
    state_readers,
    tie_equal_head,
    torch_file_contains,
)
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
        return torch_file_contains(source, b"transformer.wte.weight", b"model_args")

    def load(self) -> gptk.Checkpoint:
        found = read_torch_file(Path(self.path))
        arguments, weights = found.get("model_args"), found.get("model")
        if not isinstance(arguments, dict) or not isinstance(weights, dict):
            raise gptk.SourceError(
                f"{self.path} is not nanoGPT's ckpt.pt: it has no model and model_args"
            )
        readers = state_readers(weights)
        tensors = gptk.Tensors(readers, self.path)
        # Causal masks, stored by runs whose PyTorch lacked scaled_dot_product_attention.
        tensors.drop(
            [name for name in tensors if re.fullmatch(r"transformer\.h\.\d+\.attn\.bias", name)]
        )
        config = self._config(arguments, tied_head="lm_head.weight" not in tensors)
        stored = dtype_names(readers[name]() for name in tensors)
        config, state = tie_equal_head(config, tensors.assemble(config, _NAMES))
        return gptk.Checkpoint(
            config,
            state,
            GPT2().load if config.vocab_size in _GPT2_SIZES else None,
            self.path,
            {"format": "nanoGPT", "stored as": stored},
        )

    def _config(self, raw: dict[Any, Any], *, tied_head: bool) -> gptk.GPTConfig:
        try:
            width, n_heads, bias = raw["n_embd"], raw["n_head"], bool(raw.get("bias", True))
            if width % n_heads:
                raise gptk.SourceError(
                    f"{self.path}: a width of {width} does not make {n_heads} heads"
                )
            return gptk.GPTConfig(
                vocab_size=raw["vocab_size"],
                context_length=raw["block_size"],
                width=width,
                n_layers=raw["n_layer"],
                n_heads=n_heads,
                n_kv_heads=n_heads,
                head_dim=width // n_heads,
                mlp_width=4 * width,
                norm_bias=bias,
                mlp="gelu" if self.gelu == "exact" else "gelu-tanh",
                mlp_bias=bias,
                qkv_bias=bias,
                out_bias=bias,
                tied_head=tied_head,
            )
        except KeyError as error:
            raise gptk.SourceError(f"{self.path}: model_args has no {error.args[0]}") from None
        except (TypeError, ZeroDivisionError) as error:
            raise gptk.SourceError(f"{self.path}: wrong model_args: {error}") from None
