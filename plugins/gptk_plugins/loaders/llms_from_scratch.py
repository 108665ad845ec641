"""Checkpoints of the book "Build a Large Language Model (From Scratch)" by Sebastian Raschka.

`model.pth` is the state dict of its GPTModel (or GPTModelFast), `model_and_optimizer.pth` a dict
with that as `model_state_dict`. The number of heads is not in the file.
"""

import re
from pathlib import Path

from pydantic import Field

import gptk
from gptk_plugins.loaders._tensor_readers import dtype_names, naming
from gptk_plugins.loaders._torch_file import read_torch_file, state_readers, torch_file_contains

_NAMES = {
    "embed": "tok_emb",
    "embed_positions": "pos_emb",
    "blocks.{i}.attn.qkv": " ".join(
        f"trf_blocks.{{i}}.att.W_{part}" for part in ("query", "key", "value")
    ),
    "blocks.{i}.attn.out": "trf_blocks.{i}.att.out_proj",
    "blocks.{i}.mlp.up": "trf_blocks.{i}.ff.layers.0",
    "blocks.{i}.mlp.down": "trf_blocks.{i}.ff.layers.2",
    "head": "out_head",
}
_NORMS = {
    "blocks.{i}.attn_norm": "trf_blocks.{i}.norm1",
    "blocks.{i}.mlp_norm": "trf_blocks.{i}.norm2",
    "norm": "final_norm",
}
_BOOK_NAMES = (
    _NAMES
    | {f"{ours}.weight": f"{theirs}.scale" for ours, theirs in _NORMS.items()}
    | {f"{ours}.bias": f"{theirs}.shift" for ours, theirs in _NORMS.items()}
)
_FAST_NAMES = (
    _NAMES
    | _NORMS
    | {
        "blocks.{i}.attn.qkv": "trf_blocks.{i}.att.qkv",
        "blocks.{i}.attn.out": "trf_blocks.{i}.att.proj",
    }
)


class LLMsFromScratch(gptk.WeightLoader):
    """The book's GPTModel saved by torch.save: model.pth or model_and_optimizer.pth."""

    name = "llms-from-scratch"
    example = "path=model.pth,n_heads=12"
    positional = "path"

    path: str = Field(description="the file")
    n_heads: int | None = Field(
        None, ge=1, description="attention heads, which are not in the file; default width / 64"
    )

    @classmethod
    def matches(cls, source: str) -> bool:
        # A whole model instead of its state dict has the same names, but apart; `load` explains.
        return any(
            torch_file_contains(source, *names)
            for names in (
                (b"tok_emb.weight", b"trf_blocks.0.att."),
                (b"tok_emb", b"trf_blocks", b"W_query"),
            )
        )

    def load(self) -> gptk.Checkpoint:
        found = read_torch_file(Path(self.path))
        weights = found.get("model_state_dict", found)
        readers = state_readers(weights, self.path) if isinstance(weights, dict) else {}
        if "tok_emb.weight" not in readers:
            raise gptk.SourceError(
                f"{self.path} is not the book's GPTModel: it has no tok_emb.weight"
            )
        tensors = gptk.Tensors(readers, self.path)
        shapes = {name: tuple(read().shape) for name, read in readers.items()}
        config = self._config(shapes)
        tensors.drop(f"trf_blocks.{layer}.att.mask" for layer in range(config.n_layers))
        fast = "final_norm.weight" in tensors
        stored = dtype_names(readers[name]() for name in tensors)
        state = tensors.assemble(config, _FAST_NAMES if fast else _BOOK_NAMES)
        return gptk.Checkpoint(
            config,
            state,
            _gpt2_tokenizer if config.vocab_size == 50257 else None,
            self.path,
            {
                "format": "LLMs-from-scratch, " + ("GPTModelFast" if fast else "GPTModel"),
                "stored as": stored,
            },
        )

    def _config(self, shapes: dict[str, tuple[int, ...]]) -> gptk.GPTConfig:
        matches = (re.match(r"trf_blocks\.(\d+)\.", name) for name in shapes)
        layers = [int(match[1]) for match in matches if match]
        for name in ("tok_emb.weight", "pos_emb.weight", "trf_blocks.0.ff.layers.0.weight"):
            if len(shapes.get(name, ())) != 2:
                raise gptk.SourceError(f"{self.path}: the matrix {name} is missing")
        vocab_size, width = shapes["tok_emb.weight"]
        n_heads = self.n_heads or width // 64
        if not n_heads or width % n_heads or (self.n_heads is None and width % 64):
            raise gptk.SourceError(
                f"{self.path}: a width of {width} does not divide into "
                f"{f'{n_heads} heads' if self.n_heads else 'heads of 64'}; "
                f"give the number of heads: {self.name}:path={self.path},n_heads=N"
            )
        with naming(self.path):
            return gptk.GPTConfig(
                vocab_size=vocab_size,
                context_length=shapes["pos_emb.weight"][0],
                width=width,
                n_layers=max(layers) + 1,
                n_heads=n_heads,
                n_kv_heads=n_heads,
                head_dim=width // n_heads,
                mlp_width=shapes["trf_blocks.0.ff.layers.0.weight"][0],
                qkv_bias=any(name.endswith((".W_query.bias", ".qkv.bias")) for name in shapes),
                tied_head=False,
            )


def _gpt2_tokenizer() -> gptk.Tokenizer:
    from gptk_plugins.tokenizers.gpt2 import GPT2

    return GPT2().load()
