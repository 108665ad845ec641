"""A Hugging Face tokenizer: `tokenizer.json` and the small files beside it.

Byte-level BPE is done by tiktoken if it gives the same tokens as the library `tokenizers`; all else
is done by that library itself. A component by which single tokens have no bytes, or
that cuts texts at random, is refused by name.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import gptk
from gptk.plugins import Fields, read_json, shown
from gptk_plugins.tokenizers import bpe
from gptk_plugins.tokenizers._companions import (
    AddedToken,
    AddedVocabulary,
    Companions,
    Id,
    NumberedToken,
)
from gptk_plugins.tokenizers._library import library
from gptk_plugins.tokenizers._template import Processor, first_and_last

FILE = "tokenizer.json"
MAX_BYTES = 1 << 26
"""Twice the size of the largest ones of today, with 262,000 tokens."""
Normalization = Literal["NFC", "NFD", "NFKC", "NFKD"]
_NORMAL_FORMS: dict[str, Normalization] = {
    "NFC": "NFC",
    "NFD": "NFD",
    "NFKC": "NFKC",
    "NFKD": "NFKD",
}


class HuggingFaceTokenizer(gptk.TokenizerLoader):
    """A tokenizer.json, or the directory that holds one."""

    name = "huggingface"
    example = "path=model/tokenizer.json"
    positional = "path"

    path: Path = Field(description="the tokenizer.json, or its directory")

    @classmethod
    def matches(cls, source: str) -> bool:
        return os.path.basename(source) == FILE or os.path.isfile(os.path.join(source, FILE))

    @classmethod
    def from_source(cls, source: str) -> gptk.TokenizerLoader:
        return cls(path=source)

    def load(self) -> gptk.Tokenizer:
        return load_tokenizer_json(self.path / FILE if self.path.is_dir() else self.path)


class _Model(Fields):
    """The BPE of a tokenizer.json."""

    vocab: dict[str, Id]
    merges: list[str | list[str]]
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None


class _Step(Fields):
    """A normalizer, pre-tokenizer or decoder, or a sequence of such."""

    type: str
    normalizers: list["_Step"] = Field(default_factory=list)
    pretokenizers: list["_Step"] = Field(default_factory=list)
    decoders: list["_Step"] = Field(default_factory=list)
    add_prefix_space: bool = True
    use_regex: bool = True
    individual_digits: bool = False
    pattern: dict[str, str] = Field(default_factory=dict)
    behavior: str | None = None
    invert: bool = False


class _File(Fields):
    """A tokenizer.json."""

    model: dict[str, Any]
    added_tokens: list[NumberedToken] | None = None
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    post_processor: Processor | None = None
    decoder: _Step | None = None


def load_tokenizer_json(path: Path) -> gptk.Tokenizer:
    """The tokenizer in a tokenizer.json.

    Files in the same directory, if they exist, define further tokens, which tokens begin and end a
    text, and the chat template: see `_companions`.

    Raises TokenizerError if a file is corrupt or the tokenizer is of an unsupported kind.
    """
    companions = Companions(path.parent)
    if path.name == FILE:
        path = path.with_name(companions.tokenizer_file())
    source = str(path)
    raw = read_json(path, gptk.TokenizerError, max_bytes=MAX_BYTES)
    file = _File.parse(raw, path, gptk.TokenizerError)
    first, last = first_and_last(file.post_processor, source)
    own = file.added_tokens or ()
    added = [*companions.added_tokens(own)]
    settings: dict[str, Any] = {}
    encoding: gptk.ByteLevelBPE | gptk.PipelineEncoding
    try:
        encoding, ids, settings = _by_tiktoken(file, added, companions, source)
    except bpe.NotByTiktokenError as reason:
        encoding = _by_library(raw, added, companions, source, reason)
        ids = encoding.vocabulary()
    for role, number in (("begins", first), ("ends", last)):
        if number is not None and number not in set(ids.values()):
            raise gptk.TokenizerError(
                f"{source}: its template {role} with the id {number}, of no token"
            )
    bos = companions.ids("bos", ids) if first is None else [first]
    eos = companions.ids("eos", ids)
    return gptk.Tokenizer(
        encoding,
        bos=bos[0] if bos else None,
        eos=tuple(dict.fromkeys(eos if last is None else [last, *eos])),
        add_bos=first is not None,
        add_eos=last is not None,
        chat_template=companions.chat_template(),
        template_tokens=companions.template_tokens(),
        **settings,
    )


def _by_tiktoken(
    file: _File, beside: Sequence[AddedToken], companions: Companions, source: str
) -> tuple[gptk.ByteLevelBPE, dict[str, int], dict[str, Any]]:
    """The encoding, the ids of its tokens, and settings of gptk.Tokenizer. Raises
    NotByTiktokenError if tiktoken would give other tokens than the file says."""
    kind = file.model.get("type", "BPE")
    if kind != "BPE":
        raise _other(source, f"the model {shown(kind)}")
    model = _Model.parse(file.model, f"{source}: model", gptk.TokenizerError)
    _check_model(model, source)
    _check_decoder(file.decoder, source)
    added = AddedVocabulary(model.vocab)
    added.add(file.added_tokens or ())
    added.add(beside)
    encoding = bpe.byte_level_bpe(
        source,
        vocabulary=model.vocab,
        merges=[_merge(merge, source) for merge in model.merges],
        special=added.ids,
        pattern=_pattern(file.pre_tokenizer, source),
        whole_words=bool(model.ignore_merges),
    )
    settings = {
        "normalization": _normalization(file.normalizer, source),
        "special_options": added.options(split_special=companions.split_special_tokens),
    }
    return encoding, {**model.vocab, **added.ids}, settings


def _by_library(
    raw: dict[str, Any],
    beside: Sequence[AddedToken],
    companions: Companions,
    source: str,
    reason: bpe.NotByTiktokenError,
) -> gptk.PipelineEncoding:
    """The encoding by the library `tokenizers`. reason: why tiktoken cannot be used."""
    library(str(reason))
    # How a text begins and ends is said by gptk.Tokenizer, and it is neither cut nor padded.
    left_out = dict.fromkeys(("post_processor", "truncation", "padding"))
    try:
        return gptk.PipelineEncoding.from_json(
            Path(source).name,
            json.dumps(raw | left_out),
            added=[token.resolved().model_dump(exclude={"id"}) for token in beside],
            splits_special_tokens=companions.split_special_tokens,
        )
    except gptk.TokenizerError as error:
        raise gptk.TokenizerError(f"{source}: {error}") from None


def _check_model(model: _Model, source: str) -> None:
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if value := getattr(model, option):
            raise _other(source, f"{option}={shown(value)}")
    if model.unk_token and not model.vocab.keys() >= gptk.GPT2_ALPHABET.keys():
        raise _other(source, f"unk_token={shown(model.unk_token)} for absent bytes")


def _check_decoder(node: _Step | None, source: str) -> None:
    for decoder in _steps(node, "decoders"):
        if decoder.type != "ByteLevel":
            raise _other(source, f"the decoder {_named([decoder.type])}")


def _merge(merge: str | list[str], source: str) -> tuple[str, str]:
    """A merge: "a b" in older files, ["a", "b"] in newer ones."""
    halves = merge.split(" ") if isinstance(merge, str) else merge
    if len(halves) != 2:
        raise gptk.TokenizerError(f"{source}: the merge {shown(merge)} does not join two tokens")
    return halves[0], halves[1]


def _normalization(node: _Step | None, source: str) -> Normalization | None:
    kinds = [step.type for step in _steps(node, "normalizers")]
    if not kinds:
        return None
    if len(kinds) > 1 or kinds[0] not in _NORMAL_FORMS:
        raise _other(source, f"the normalizer {_named(kinds)}")
    return _NORMAL_FORMS[kinds[0]]


def _pattern(node: _Step | None, source: str) -> str:
    """The pre-tokenizer as one pattern, whose matches are the pieces of a text."""
    steps = _steps(node, "pretokenizers")
    kinds = [step.type for step in steps]
    what = f"the pre-tokenizer {_named(kinds)}"
    if not steps or kinds[-1] != "ByteLevel":
        raise _other(source, what)
    *splits, byte_level = steps
    if byte_level.add_prefix_space:
        raise _other(source, "add_prefix_space=true")
    known = gptk.SPLIT_PATTERNS
    match [step.type for step in splits], byte_level.use_regex:
        case [], True:
            return known["gpt2"]
        case [], False:
            return known["whole"]
        case ["Digits"], True:
            return known["gpt2-digits" if splits[0].individual_digits else "gpt2-numbers"]
        case ["Split"], False:
            return _split_pattern(splits[0], source)
    raise _other(source, f"{what} with use_regex={byte_level.use_regex}")


def _split_pattern(split: _Step, source: str) -> str:
    expression = split.pattern.get("Regex")
    if expression is None:
        raise _other(source, f"Split by the text {shown(split.pattern.get('String'))}")
    try:
        pattern = gptk.SplitPattern.parse(expression, "oniguruma")
    except gptk.TokenizerError as error:
        raise _other(source, str(error)) from None
    match split.behavior, split.invert:
        case "Isolated", _:
            return pattern.with_gaps().written("tiktoken")
        case "Removed", True:
            return pattern.written("tiktoken")
    raise _other(source, f"Split with behavior={split.behavior} and invert={split.invert}")


def _steps(node: _Step | None, plural: str) -> list[_Step]:
    """A component as the list of its steps. plural: the key of the list in a Sequence."""
    if node is None:
        return []
    return list(getattr(node, plural)) if node.type == "Sequence" else [node]


def _named(kinds: list[str]) -> str:
    return " + ".join(kind[:60] for kind in kinds[:6]) or "null"


def _other(source: str, what: str) -> bpe.NotByTiktokenError:
    return bpe.NotByTiktokenError(f"{source}: {what}")
