"""GGUF files, the format of llama.cpp: GPT-2, Llama (SmolLM2 and Mistral too), Qwen2, Qwen3."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

import gptk
from gptk.plugins import Fields, open_regular, shown
from gptk_plugins.gguf_file import GGUFFile, read_gguf
from gptk_plugins.loaders._heads import check_head_dim
from gptk_plugins.loaders._tensor_readers import naming, tie_equal_head

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
        with open_regular(source) as file:
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


def _one(value: Any) -> Any:
    """A number, or the common value of a list with one for each layer."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


_Size = Annotated[int, BeforeValidator(_one), Field(ge=1)]
_Number = Annotated[float, BeforeValidator(_one)]


class _General(Fields):
    """Metadata of the file."""

    architecture: str = Field(alias="general.architecture")
    parts: int = Field(1, alias="split.count")


class _Metadata(Fields):
    """Metadata of an architecture, by keys without its prefix."""

    context_length: _Size
    embedding_length: _Size
    block_count: _Size
    feed_forward_length: _Size
    head_count: _Size = Field(alias="attention.head_count")
    head_count_kv: _Size | None = Field(None, alias="attention.head_count_kv")
    key_length: _Size | None = Field(None, alias="attention.key_length")
    sliding_window: Annotated[int, BeforeValidator(_one), Field(ge=0)] = Field(
        0, alias="attention.sliding_window"
    )
    layer_norm_epsilon: _Number | None = Field(None, alias="attention.layer_norm_epsilon")
    rms_epsilon: _Number | None = Field(None, alias="attention.layer_norm_rms_epsilon")
    rope_base: _Number = Field(10000.0, alias="rope.freq_base")
    rope_scaling: str | None = Field(None, alias="rope.scaling.type")
    rope_factor: _Number | None = Field(None, alias="rope.scaling.factor")
    rope_scale_linear: _Number = Field(1.0, alias="rope.scale_linear")


def _config(
    file: GGUFFile, tensors: gptk.Tensors, source: str
) -> tuple[gptk.GPTConfig, dict[str, str]]:
    general = _General.parse(file.fields, source)
    if general.architecture not in ARCHITECTURES:
        raise gptk.SourceError(
            f"{source}: the architecture {shown(general.architecture)} is not supported; "
            f"{', '.join(ARCHITECTURES)} are"
        )
    if general.parts > 1:
        raise gptk.SourceError(
            f"{source} is one of {general.parts} parts; join them with llama-gguf-split --merge"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise gptk.SourceError(f"{source}: the matrix token_embd.weight is missing")
    prefix = f"{general.architecture}."
    own = {key.removeprefix(prefix): x for key, x in file.fields.items() if key.startswith(prefix)}
    metadata = _Metadata.parse(own, f"{source}: the metadata of {general.architecture}")
    gpt2 = general.architecture == "gpt2"
    head_dim = metadata.key_length or metadata.embedding_length // metadata.head_count
    _check_supported(metadata, own, source)
    eps = metadata.layer_norm_epsilon if gpt2 else metadata.rms_epsilon
    if eps is None:
        key = f"attention.layer_norm_{'' if gpt2 else 'rms_'}epsilon"
        raise gptk.SourceError(f"{source}: the metadata of {general.architecture} has no {key}")
    context, notes = metadata.context_length, _notes(file)
    if window := metadata.sliding_window:
        # Within the length of the sliding window, it has no effect on attention.
        notes["context"] = f"{min(context, window)}, limited from {context} by a sliding window"
        context = min(context, window)
    with naming(source):
        config = gptk.GPTConfig(
            vocab_size=embedding.shape[0],
            context_length=context,
            width=metadata.embedding_length,
            n_layers=metadata.block_count,
            n_heads=metadata.head_count,
            n_kv_heads=metadata.head_count_kv or metadata.head_count,
            head_dim=head_dim,
            mlp_width=metadata.feed_forward_length,
            norm="layer" if gpt2 else "rms",
            norm_eps=eps,
            positions="learned" if gpt2 else "rotary",
            rope_theta=metadata.rope_base,
            rope_factors=None if gpt2 else _rope_factors(metadata, tensors, head_dim, source),
            mlp="gelu-tanh" if gpt2 else "swiglu",
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
            out_bias="blk.0.attn_output.bias" in tensors,
            qk_norm=general.architecture == "qwen3",
            tied_head="output.weight" not in tensors,
        )
    return config, notes


def _check_supported(metadata: _Metadata, own: Mapping[str, Any], source: str) -> None:
    """Raises SourceError for metadata that ask for what gptk.GPT does not compute."""
    head_dim = metadata.key_length or metadata.embedding_length // metadata.head_count
    supported = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, **_NEUTRAL}
    for key, value in supported.items():
        if own.get(key, value) != value:
            raise gptk.SourceError(
                f"{source}: its {key} is {shown(own[key])}; only {value!r} is supported"
            )


_NEUTRAL = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
"""Metadata that change what llama.cpp computes for some architecture, with the value that changes
nothing."""


def _notes(file: GGUFFile) -> dict[str, str]:
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.type] += tensor.nbytes
    expanded = [
        f"{name} ({tensor.type})" for name, tensor in file.tensors.items() if tensor.is_expanded
    ]
    more = f" and {len(expanded) - 3} more" if len(expanded) > 3 else ""
    notes = {"not kept as stored": ", ".join(expanded[:3]) + more} if expanded else {}
    return notes | {
        "format": "GGUF",
        "stored as": ", ".join(sorted(sizes)),
        "in the file": ", ".join(
            f"{n / 2**20:,.1f} MiB {kind}" for kind, n in sorted(sizes.items())
        ),
    }


def _rope_factors(
    metadata: _Metadata, tensors: gptk.Tensors, head_dim: int, source: str
) -> tuple[float, ...] | None:
    """The divisors of the rotary frequencies, if the context was extended."""
    scaling = metadata.rope_scaling
    if scaling not in (None, "none", "linear"):
        raise gptk.SourceError(
            f"{source}: rotary scaling {shown(scaling)} is not supported; none and linear are"
        )
    scale = 1.0
    if scaling != "none":
        scale = metadata.rope_scale_linear if metadata.rope_factor is None else metadata.rope_factor
    if "rope_freqs.weight" in tensors:
        factors = tensors.take("rope_freqs.weight")
        if tuple(factors.shape) != (head_dim // 2,):
            raise gptk.SourceError(
                f"{source}: the tensor rope_freqs.weight of shape {tuple(factors.shape)} does not "
                f"fit heads of {head_dim}"
            )
        return tuple(scale * factor for factor in factors.tolist())
    if scale in (0.0, 1.0):
        return None
    with naming(source):
        check_head_dim(head_dim)
    return (scale,) * (head_dim // 2)
