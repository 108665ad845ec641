"""OpenAI's original GPT-2 (Radford et al. 2019): a TensorFlow checkpoint, read without TensorFlow.

hparams.json                     n_vocab, n_ctx, n_embd, n_head, n_layer
model.ckpt.index, model.ckpt.data-00000-of-00001
encoder.json, vocab.bpe          the tokenizer
checkpoint                       names the checkpoint if it is not model.ckpt, after fine-tuning
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.loaders._tensor_bundle import read_bundle
from gptk_plugins.loaders._tensor_readers import dtype_names
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
        if not os.path.isfile(os.path.join(source, "hparams.json")):  # takes any text
            return False
        return Path(f"{_prefix(Path(source))}.index").is_file()

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
    try:
        text = (folder / "checkpoint").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # It names the path at which it was written; only the file name is used.
    named = re.search(r'^model_checkpoint_path: "(?:[^"]*[\\/])?([^"\\/]+)"', text, re.MULTILINE)
    if named and (folder / f"{named[1]}.index").is_file():
        return folder / named[1]
    return folder / "model.ckpt"


def _config(path: Path) -> gptk.GPTConfig:
    raw = _read_json(path, gptk.SourceError)
    try:
        width, n_heads = raw["n_embd"], raw["n_head"]
        if width % n_heads:
            raise gptk.SourceError(f"{path}: a width of {width} does not make {n_heads} heads")
        return gptk.GPTConfig(
            vocab_size=raw["n_vocab"],
            context_length=raw["n_ctx"],
            width=width,
            n_layers=raw["n_layer"],
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=width // n_heads,
            mlp_width=4 * width,
        )
    except KeyError as error:
        raise gptk.SourceError(f"{path} has no {error.args[0]}") from None
    except (TypeError, ZeroDivisionError) as error:
        raise gptk.SourceError(f"{path} holds a wrong value: {error}") from None


def _linear(name: str, tensor: Tensor) -> Tensor:
    """Linear layers are stored as convolutions of width 1: (1, in, out)."""
    return tensor.squeeze(0).T.contiguous() if name.endswith("/w") else tensor


def _tokenizer(folder: Path, vocab_size: int) -> Callable[[], gptk.Tokenizer] | None:
    if all((folder / name).is_file() for name in ("encoder.json", "vocab.bpe")):
        return lambda: _read_tokenizer(folder)
    return GPT2().load if vocab_size == 50257 else None


def _read_tokenizer(folder: Path) -> gptk.Tokenizer:
    from gptk_plugins.tokenizers import bpe

    vocabulary = _read_json(folder / "encoder.json", gptk.TokenizerError)
    path = folder / "vocab.bpe"
    try:
        # A line with the version, then a merge per line.
        lines = path.read_text(encoding="utf-8").split("\n")[1:]
        merges = [(left, right) for left, right in (line.split() for line in lines if line.strip())]
        special = {END_OF_TEXT: vocabulary[END_OF_TEXT]}
    except (OSError, ValueError) as error:
        raise gptk.TokenizerError(f"{path} is damaged: {error}") from None
    except KeyError:
        raise gptk.TokenizerError(f"{folder / 'encoder.json'} has no {END_OF_TEXT}") from None
    encoding = bpe.byte_level_bpe(
        str(folder),
        vocabulary=vocabulary,
        merges=merges,
        special=special,
        pattern=gptk.SPLIT_PATTERNS["gpt2"],
    )
    end = special[END_OF_TEXT]
    return gptk.Tokenizer(encoding, bos=end, eos=(end,))


def _read_json(path: Path, error_type: type[gptk.GptkError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error_type(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise error_type(f"{path} holds no JSON object")
    return value
