"""A Hugging Face tokenizer: `tokenizer.json` and the small files beside it.

Byte-level BPE is supported, with the same tokens as the `tokenizers` library; a component that
would give other tokens is refused by name.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import gptk
from gptk.plugins import Fields, read_json, shown
from gptk_plugins.tokenizers import bpe
from gptk_plugins.tokenizers._companions import AddedVocabulary, Companions, Id, NumberedToken

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


class _TemplateToken(Fields):
    ids: list[Id]


class _Piece(Fields):
    id: str


class _Step(Fields):
    """A normalizer, pre-tokenizer, post-processor or decoder, or a sequence of such."""

    type: str
    normalizers: list["_Step"] = Field(default_factory=list)
    pretokenizers: list["_Step"] = Field(default_factory=list)
    processors: list["_Step"] = Field(default_factory=list)
    decoders: list["_Step"] = Field(default_factory=list)
    add_prefix_space: bool = True
    use_regex: bool = True
    individual_digits: bool = False
    pattern: dict[str, str] = Field(default_factory=dict)
    behavior: str | None = None
    invert: bool = False
    single: list[dict[str, _Piece]] = Field(default_factory=list)
    special_tokens: dict[str, _TemplateToken] = Field(default_factory=dict)


class _File(Fields):
    """A tokenizer.json."""

    model: dict[str, Any]
    added_tokens: list[NumberedToken] | None = None
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    post_processor: _Step | None = None
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
    kind = file.model.get("type", "BPE")
    if kind != "BPE":
        raise _unsupported(source, f"the model {shown(kind)}")
    model = _Model.parse(file.model, f"{path}: model", gptk.TokenizerError)
    _check_model(model, source)
    _check_decoder(file.decoder, source)
    added = AddedVocabulary(model.vocab)
    added.add(file.added_tokens or ())
    added.add(companions.added_tokens(file.added_tokens or ()))
    encoding = bpe.byte_level_bpe(
        source,
        vocabulary=model.vocab,
        merges=[_merge(merge, source) for merge in model.merges],
        special=added.ids,
        pattern=_pattern(file.pre_tokenizer, source),
        whole_words=bool(model.ignore_merges),
    )
    first = _first_token(file.post_processor, source)
    ids = {**model.vocab, **added.ids}
    if first is not None and first not in set(ids.values()):
        raise gptk.TokenizerError(f"{source}: its template begins with the id {first}, of no token")
    bos = companions.ids("bos", ids) if first is None else [first]
    return gptk.Tokenizer(
        encoding,
        bos=bos[0] if bos else None,
        eos=tuple(companions.ids("eos", ids)),
        add_bos=first is not None,
        normalization=_normalization(file.normalizer, source),
        chat_template=companions.chat_template(),
        template_tokens=companions.template_tokens(),
        special_options=added.options(split_special=companions.split_special_tokens),
    )


def _check_model(model: _Model, source: str) -> None:
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if value := getattr(model, option):
            raise _unsupported(source, f"{option}={shown(value)}")
    if model.unk_token and not model.vocab.keys() >= bpe.ALPHABET.keys():
        raise _unsupported(source, f"unk_token={shown(model.unk_token)} for absent bytes")


def _check_decoder(node: _Step | None, source: str) -> None:
    for decoder in _steps(node, "decoders"):
        if decoder.type != "ByteLevel":
            raise _unsupported(source, f"the decoder {_named([decoder.type])}")


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
        raise _unsupported(source, f"the normalizer {_named(kinds)}")
    return _NORMAL_FORMS[kinds[0]]


def _pattern(node: _Step | None, source: str) -> str:
    """The pre-tokenizer as one pattern, whose matches are the pieces of a text."""
    steps = _steps(node, "pretokenizers")
    kinds = [step.type for step in steps]
    what = f"the pre-tokenizer {_named(kinds)}"
    if not steps or kinds[-1] != "ByteLevel":
        raise _unsupported(source, what)
    *splits, byte_level = steps
    if byte_level.add_prefix_space:
        raise _unsupported(source, "add_prefix_space=true")
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
    raise _unsupported(source, f"{what} with use_regex={byte_level.use_regex}")


def _split_pattern(split: _Step, source: str) -> str:
    expression = split.pattern.get("Regex")
    if expression is None:
        raise _unsupported(source, f"Split by the text {shown(split.pattern.get('String'))}")
    try:
        pattern = gptk.SplitPattern.parse(expression, "oniguruma")
    except gptk.TokenizerError as error:
        raise gptk.TokenizerError(f"{source}: {error}") from None
    match split.behavior, split.invert:
        case "Isolated", _:
            return pattern.with_gaps().written("tiktoken")
        case "Removed", True:
            return pattern.written("tiktoken")
    raise _unsupported(source, f"Split with behavior={split.behavior} and invert={split.invert}")


def _first_token(node: _Step | None, source: str) -> int | None:
    """The token that the post-processor puts in front of a text."""
    first = None
    for processor in _steps(node, "processors"):
        if processor.type == "ByteLevel":
            continue
        if processor.type != "TemplateProcessing":
            raise _unsupported(source, f"the post-processor {_named([processor.type])}")
        match [next(iter(piece.items()), ("", None)) for piece in processor.single]:
            case [("Sequence", _)]:
                continue
            case [("SpecialToken", _Piece(id=name)), ("Sequence", _)] if first is None:
                token = processor.special_tokens.get(name)
                if token is None or len(token.ids) != 1:
                    raise _unsupported(source, f"a template with the token {shown(name)}")
                first = token.ids[0]
            case _:
                raise _unsupported(source, "a template with more than one token before the text")
    return first


def _steps(node: _Step | None, plural: str) -> list[_Step]:
    """A component as the list of its steps. plural: the key of the list in a Sequence."""
    if node is None:
        return []
    return list(getattr(node, plural)) if node.type == "Sequence" else [node]


def _named(kinds: list[str]) -> str:
    return " + ".join(kind[:60] for kind in kinds[:6]) or "null"


def _unsupported(source: str, what: str) -> gptk.TokenizerError:
    return gptk.TokenizerError(
        f"{source}: {what} is not supported; name another tokenizer with --tokenizer"
    )
