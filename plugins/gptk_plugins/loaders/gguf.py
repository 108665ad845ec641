"""GGUF files, the format of llama.cpp: GPT-2, Llama (SmolLM2 and Mistral too), Qwen2, Qwen3."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.gguf_file import GGUFFile, read_gguf
from gptk_plugins.loaders._tensor_readers import tie_equal_head

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")

_NAMES = {
    "embed": "token_embd",
    "embed_positions": "position_embd",
    "blocks.{i}.attn_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attn.qkv": "blk.{i}.attn_q blk.{i}.attn_k blk.{i}.attn_v",
    "blocks.{i}.attn.q_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attn.k_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.attn.out": "blk.{i}.attn_output",
    "blocks.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.up": "blk.{i}.ffn_gate blk.{i}.ffn_up",
    "blocks.{i}.mlp.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
_GPT2_NAMES = _NAMES | {
    "blocks.{i}.attn.qkv": "blk.{i}.attn_qkv",
    "blocks.{i}.mlp.up": "blk.{i}.ffn_up",
}


class GGUF(gptk.WeightLoader):
    """A GGUF file of llama.cpp's, quantized or not: gpt2, llama, qwen2 or qwen3."""

    name = "gguf"
    example = "path=model.gguf"
    positional = "path"

    path: str = Field(description="the file")

    @classmethod
    def matches(cls, source: str) -> bool:
        if not os.path.isfile(source):
            return False
        with open(source, "rb") as file:
            return source.endswith(".gguf") or file.read(4) == b"GGUF"

    def load(self) -> gptk.Checkpoint:
        return load_gguf(Path(self.path))

    def load_stored(self) -> gptk.Checkpoint:
        return load_gguf(Path(self.path), stored=True)


def load_gguf(path: Path, *, stored: bool = False) -> gptk.Checkpoint:
    """Read a GGUF file. stored: keep quantized matrices as Levels. Raises SourceError."""
    file = read_gguf(path)
    source = str(path)
    readers: dict[str, Callable[[], Tensor | gptk.Levels]] = {
        name: (stored and tensor.read_levels) or tensor.read
        for name, tensor in file.tensors.items()
    }
    tensors = gptk.Tensors(readers, source)
    config, notes = _config(file, tensors, source)
    architecture = file.fields["general.architecture"]
    state = tensors.assemble(
        config,
        _GPT2_NAMES if architecture == "gpt2" else _NAMES,
        _undo_permutation(config) if architecture == "llama" else None,
    )
    config, state = tie_equal_head(config, state)

    def tokenizer() -> gptk.Tokenizer:
        from gptk_plugins.tokenizers.gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(file.fields, source)

    return gptk.Checkpoint(
        config,
        state,
        tokenizer if "tokenizer.ggml.tokens" in file.fields else None,
        source,
        notes,
    )


def _undo_permutation(
    config: gptk.GPTConfig,
) -> Callable[[str, Tensor | gptk.Levels], Tensor | gptk.Levels]:
    """Undo llama.cpp's permutation of the rows of Llama's query and key weights.

    In llama.cpp a rotary pair is two adjacent rows of a head; in `gptk.GPT` it is the same row of
    the head's two halves.
    """

    def change(name: str, tensor: Tensor | gptk.Levels) -> Tensor | gptk.Levels:
        if ".attn_q." not in name and ".attn_k." not in name:
            return tensor
        rows = torch.arange(tensor.shape[0]).view(-1, config.head_dim // 2, 2)
        return tensor[rows.transpose(1, 2).flatten()]

    return change


def _config(
    file: GGUFFile, tensors: gptk.Tensors, source: str
) -> tuple[gptk.GPTConfig, dict[str, str]]:
    architecture = file.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise gptk.SourceError(
            f"{source}: the architecture {architecture!r} is not supported; "
            f"{', '.join(ARCHITECTURES)} are"
        )
    if file.fields.get("split.count", 1) > 1:
        raise gptk.SourceError(
            f"{source} is one of {file.fields['split.count']} parts; "
            "join them with llama-gguf-split --merge"
        )
    if "token_embd.weight" not in file.tensors:
        raise gptk.SourceError(f"{source}: the tensor token_embd.weight is missing")
    metadata = _Metadata(file.fields, architecture, source)
    gpt2 = architecture == "gpt2"
    width, n_heads = metadata.number("embedding_length"), metadata.number("attention.head_count")
    head_dim = metadata.number("attention.key_length", width // max(n_heads, 1))
    for key, supported in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("expert_count", 0),
        ("attention.causal", True),
    ):
        metadata.require(key, supported)
    context = metadata.number("context_length")
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.type] += tensor.nbytes
    notes = {
        "format": "GGUF",
        "stored as": ", ".join(sorted(sizes)),
        "in the file": ", ".join(
            f"{n / 2**20:,.1f} MiB {kind}" for kind, n in sorted(sizes.items())
        ),
    }
    if window := metadata.number("attention.sliding_window", 0):
        # Within the length of the sliding window, it has no effect on attention.
        notes["context"] = f"{min(context, window)}, limited from {context} by a sliding window"
        context = min(context, window)
    config = gptk.GPTConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        context_length=context,
        width=width,
        n_layers=metadata.number("block_count"),
        n_heads=n_heads,
        n_kv_heads=metadata.number("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        mlp_width=metadata.number("feed_forward_length"),
        norm="layer" if gpt2 else "rms",
        norm_eps=metadata.number(f"attention.layer_norm_{'' if gpt2 else 'rms_'}epsilon"),
        positions="learned" if gpt2 else "rotary",
        rope_theta=metadata.number("rope.freq_base", 10000.0),
        rope_factors=None if gpt2 else _rope_factors(metadata, tensors, head_dim // 2),
        mlp="gelu-tanh" if gpt2 else "swiglu",
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        qk_norm=architecture == "qwen3",
        tied_head="output.weight" not in tensors,
    )
    return config, notes


def _rope_factors(
    metadata: "_Metadata", tensors: gptk.Tensors, pairs: int
) -> tuple[float, ...] | None:
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise gptk.SourceError(
            f"{metadata.source}: rotary scaling {scaling!r} is not supported; none and linear are"
        )
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    scale = factor if scaling == "linear" or metadata.get("rope.scaling.type") is None else 1.0
    if "rope_freqs.weight" in tensors:
        return tuple(scale * factor for factor in tensors.take("rope_freqs.weight").tolist())
    return None if scale in (0.0, 1.0) else (scale,) * pairs


class _Metadata:
    """The metadata of an architecture, by keys without its prefix."""

    def __init__(self, fields: Mapping[str, Any], architecture: str, source: str) -> None:
        self._fields, self._architecture, self.source = fields, architecture, source

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(f"{self._architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, or the common value of a list with one per layer. Raises SourceError."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int | float):
            return value
        found = "is missing" if value is None else f"is {value!r}"
        raise gptk.SourceError(
            f"{self.source}: {self._architecture}.{key} {found}; it must be one number"
        )

    def require(self, key: str, supported: Any) -> None:
        """Raises SourceError if the key is present with another value than `supported`."""
        if (value := self.get(key, supported)) != supported:
            raise gptk.SourceError(
                f"{self.source}: {self._architecture}.{key} is {value!r}; "
                f"only {supported!r} is supported for this model"
            )
