"""OpenAI's original GPT-2 (Radford et al. 2019): a TensorFlow checkpoint, read without TensorFlow.

hparams.json                     n_vocab, n_ctx, n_embd, n_head, n_layer
model.ckpt.index, model.ckpt.data-00000-of-00001
encoder.json, vocab.bpe          the tokenizer
checkpoint                       names the checkpoint if it is not model.ckpt, after fine-tuning
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from pydantic import Field
from torch import Tensor

import gptk
from gptk.plugins import Fields, read_json, read_text, shown
from gptk_plugins.loaders._heads import head_dim_of
from gptk_plugins.loaders._tensor_bundle import read_bundle
from gptk_plugins.loaders._tensor_readers import dtype_names, naming
from gptk_plugins.tokenizers.gpt2 import END_OF_TEXT, GPT2

_NORMS = {
    "blocks.{i}.attn_norm": "model/h{i}/ln_1",
    "blocks.{i}.mlp_norm": "model/h{i}/ln_2",
    "norm": "model/ln_f",
}
_LINEARS = {
    "blocks.{i}.attn.qkv": "model/h{i}/attn/c_attn",
    "blocks.{i}.attn.out": "model/h{i}/attn/c_proj",
    "blocks.{i}.mlp.up": "model/h{i}/mlp/c_fc",
    "blocks.{i}.mlp.down": "model/h{i}/mlp/c_proj",
}
_NAMES = (
    {"embed.weight": "model/wte", "embed_positions.weight": "model/wpe"}
    | {f"{ours}.weight": f"{theirs}/g" for ours, theirs in _NORMS.items()}
    | {f"{ours}.weight": f"{theirs}/w" for ours, theirs in _LINEARS.items()}
    | {f"{ours}.bias": f"{theirs}/b" for ours, theirs in (_NORMS | _LINEARS).items()}
)


class OpenAI(gptk.WeightLoader):
    """OpenAI's GPT-2 as first released: a directory with hparams.json and model.ckpt.index."""

    name = "openai"
    example = "path=models/124M"
    positional = "path"

    path: str = Field(description="the directory")

    @classmethod
    def matches(cls, source: str) -> bool:
        parameters = os.path.join(source, "hparams.json")
        return os.path.isfile(parameters) and os.path.isfile(f"{_prefix(Path(source))}.index")

    def load(self) -> gptk.Checkpoint:
        folder = Path(self.path)
        config = _config(folder / "hparams.json")
        readers = read_bundle(_prefix(folder))
        state = gptk.Tensors(readers, self.path).assemble(config, _NAMES, _linear)
        stored = dtype_names(read() for read in readers.values())  # this verifies all checksums
        return gptk.Checkpoint(
            config,
            state,
            _tokenizer(folder, config.vocab_size),
            self.path,
            {"format": "OpenAI's GPT-2, TensorFlow", "stored as": stored},
        )


def _prefix(folder: Path) -> Path:
    """The checkpoint's path without `.index`."""
    path, text = folder / "checkpoint", ""
    if os.path.isfile(path):
        with contextlib.suppress(gptk.SourceError):  # then it is model.ckpt, if that exists
            text = read_text(path)
    # It names the path at which it was written; only the file name is used.
    named = re.search(r'^model_checkpoint_path: "(?:[^"]*[\\/])?([^"\\/]+)"', text, re.MULTILINE)
    if named and os.path.isfile(f"{folder / named[1]}.index"):
        return folder / named[1]
    return folder / "model.ckpt"


class _Parameters(Fields):
    """hparams.json."""

    n_vocab: int = Field(ge=1)
    n_ctx: int = Field(ge=1)
    n_embd: int = Field(ge=1)
    n_head: int = Field(ge=1)
    n_layer: int = Field(ge=1)


def _config(path: Path) -> gptk.GPTConfig:
    fields = _Parameters.parse(read_json(path), path)
    with naming(path):
        return gptk.GPTConfig(
            vocab_size=fields.n_vocab,
            context_length=fields.n_ctx,
            width=fields.n_embd,
            n_layers=fields.n_layer,
            n_heads=fields.n_head,
            n_kv_heads=fields.n_head,
            head_dim=head_dim_of(fields.n_embd, fields.n_head),
            mlp_width=4 * fields.n_embd,
        )


def _linear(name: str, tensor: Tensor) -> Tensor:
    """Linear layers are stored as convolutions of width 1: (1, in, out)."""
    return tensor.squeeze(0).T.contiguous() if name.endswith("/w") else tensor


def _tokenizer(folder: Path, vocab_size: int) -> Callable[[], gptk.Tokenizer] | None:
    if all((folder / name).is_file() for name in ("encoder.json", "vocab.bpe")):
        return lambda: _read_tokenizer(folder)
    return GPT2().load if vocab_size == 50257 else None


def _read_tokenizer(folder: Path) -> gptk.Tokenizer:
    from gptk_plugins.tokenizers import bpe

    path = folder / "encoder.json"
    vocabulary = read_json(path, gptk.TokenizerError)
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise gptk.TokenizerError(
                f"{path}: the token {shown(token)} is {shown(number)}; it must be a whole number"
            )
    if END_OF_TEXT not in vocabulary:
        raise gptk.TokenizerError(f"{path} has no {END_OF_TEXT}")
    path = folder / "vocab.bpe"
    # A line with the version, then a merge per line.
    lines = read_text(path, gptk.TokenizerError).split("\n")[1:]
    merges = []
    for number, line in enumerate(lines, start=2):
        pair = line.split()
        if line.strip():
            if len(pair) != 2:
                raise gptk.TokenizerError(f"{path}: line {number} is {shown(line)}, not a merge")
            merges.append((pair[0], pair[1]))
    end = vocabulary[END_OF_TEXT]
    encoding = bpe.byte_level_bpe(
        str(folder),
        vocabulary=vocabulary,
        merges=merges,
        special={END_OF_TEXT: end},
        pattern=gptk.SPLIT_PATTERNS["gpt2"],
    )
    return gptk.Tokenizer(encoding, bos=end, eos=(end,))
