"""GGUF files, the format of llama.cpp, in one part or several, of the architectures in
`_gguf_config`."""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk.plugins import open_regular
from gptk_plugins.gguf_file import GGUFFile, StoredTensor, read_gguf
from gptk_plugins.loaders._gguf_config import ARCHITECTURES, General, read_config
from gptk_plugins.loaders._heads import reorder_heads, rotated_apart
from gptk_plugins.loaders._tensor_readers import tie_equal_head

_NAMES = {
    "embed": "token_embd",
    "embed_positions": "position_embd",
    "blocks.{i}.attn_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attn.qkv": "blk.{i}.attn_q blk.{i}.attn_k blk.{i}.attn_v",
    "blocks.{i}.attn.q_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attn.k_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.attn.out": "blk.{i}.attn_output",
    "blocks.{i}.attn_post_norm": "blk.{i}.post_attention_norm",
    "blocks.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.up": "blk.{i}.ffn_gate blk.{i}.ffn_up",
    "blocks.{i}.mlp.down": "blk.{i}.ffn_down",
    "blocks.{i}.mlp.router": "blk.{i}.ffn_gate_inp",
    "blocks.{i}.mlp.experts.{e}.up": "blk.{i}.ffn_gate.{e} blk.{i}.ffn_up.{e}",
    "blocks.{i}.mlp.experts.{e}.down": "blk.{i}.ffn_down.{e}",
    "blocks.{i}.mlp_post_norm": "blk.{i}.post_ffw_norm",
    "norm": "output_norm",
    "head": "output",
}
_FUSED_QKV = {"blocks.{i}.attn.qkv": "blk.{i}.attn_qkv"}
_ONE_UP = {"blocks.{i}.mlp.up": "blk.{i}.ffn_up"}
_OTHER_NAMES = {
    "gpt2": _FUSED_QKV | _ONE_UP,
    "gptneox": _FUSED_QKV | _ONE_UP,
    "phi3": _FUSED_QKV | _ONE_UP,
}
"""Of architectures that store several matrices as one, or have no gate."""
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")
"""The matrices of all experts of a layer."""

Matrix = Tensor | gptk.Levels


class GGUF(gptk.WeightLoader):
    """A GGUF file of llama.cpp's, quantized or not, of GPT-2, Llama, Gemma and others."""

    name = "gguf"
    example = "path=model.gguf"
    positional = "path"

    path: str = Field(description="the file, or the first part of it")

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
    source = str(path)
    file = _with_all_parts(read_gguf(path), path)
    readers: dict[str, Callable[[], Matrix]] = {
        name: (stored and tensor.read_levels) or tensor.read
        for name, tensor in _each_expert(file.tensors).items()
    }
    tensors = gptk.Tensors(readers, source)
    config = read_config(file, tensors, source)
    notes = _notes(file)
    original = file.fields[f"{file.fields['general.architecture']}.context_length"]
    if config.context_length < original:
        notes["context"] = f"{config.context_length}, limited from {original} by longrope"
    architecture = file.fields["general.architecture"]
    names = _NAMES | _OTHER_NAMES.get(architecture, {})
    state = tensors.assemble(config, names, _change(config, architecture))
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


def _change(config: gptk.GPTConfig, architecture: str) -> Callable[[str, Matrix], Matrix] | None:
    """Bring the rows of queries and keys into the order that `gptk.GPT` has.

    In llama.cpp a rotary pair is two adjacent rows of a head, for some architectures; in `gptk.GPT`
    it is the same row of the head's two halves. Of a head that is rotated in part, see
    `rotated_apart`.
    """
    d = config.head_dim
    if ARCHITECTURES[architecture].is_permuted:
        order = torch.arange(d).view(d // 2, 2).T.flatten()
    elif config.rotary_dim is not None:
        order = rotated_apart(d, config.rotary_dim)
    else:
        return None
    heads, kv_heads, plain = config.n_heads, config.n_kv_heads, torch.arange(d)
    parts = {
        "attn_q": ((order,), (heads,)),
        "attn_k": ((order,), (kv_heads,)),
        "attn_qkv": ((order, order, plain), (heads, kv_heads, kv_heads)),
    }

    def change(name: str, tensor: Matrix) -> Matrix:
        part = parts.get(name.split(".")[-2])
        return tensor if part is None else reorder_heads(tensor, *part, d)

    return change


def _each_expert(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, with a matrix for each expert in the place of one tensor for all of a layer."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        match = _EXPERTS.fullmatch(name)
        parts = (
            {name: tensor}
            if match is None
            else {f"{match[1]}.{number}.weight": part for number, part in enumerate(tensor.split())}
        )
        found |= parts
    return found


# --- Files in several parts ------------------------------------------------------------------

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 1000


def _with_all_parts(file: GGUFFile, path: Path) -> GGUFFile:
    """The file with the tensors of all its parts, which llama-gguf-split makes. Raises SourceError
    if one is missing, or if this is not the first."""
    general = General.parse({"general.architecture": "", **file.fields}, str(path))
    if general.parts <= 1:
        return file
    match, count = _PART.fullmatch(path.name), general.parts
    if match is None or int(match[3]) != count or int(match[2]) != general.part + 1:
        raise gptk.SourceError(
            f"{path} is part {general.part + 1} of {count}; its name must be "
            f"NAME-{general.part + 1:05}-of-{count:05}.gguf, with the others beside it"
        )
    if count > _MAX_PARTS:
        raise gptk.SourceError(f"{path} would have {count:,} parts; {_MAX_PARTS:,} are the most")
    names = [f"{match[1]}-{part + 1:05}-of-{count:05}.gguf" for part in range(count)]
    if general.part:
        raise gptk.SourceError(f"{path} is part {general.part + 1}; load the first, {names[0]}")
    tensors = dict(file.tensors)
    for part, name in enumerate(names[1:], start=1):
        other = path.with_name(name)
        if not os.path.lexists(other):
            raise gptk.SourceError(f"{path} has {count} parts; {name} is missing")
        more = read_gguf(other)
        told = General.parse({"general.architecture": "", **more.fields}, str(other))
        if (told.part, told.parts) != (part, count):
            raise gptk.SourceError(
                f"{other} is part {told.part + 1} of {told.parts}, not {part + 1} of {count}"
            )
        if twice := sorted(tensors.keys() & more.tensors.keys()):
            raise gptk.SourceError(f"{path}: the tensor {twice[0]} is in two parts")
        tensors |= more.tensors
    return GGUFFile(file.fields, tensors)


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
