"""The tokenizer in a GGUF file: its metadata under `tokenizer.ggml`.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Three kinds are read: `gpt2`
is byte-level BPE, done by tiktoken; `llama` and `t5` are SentencePiece's, see `_sentencepiece`. Of
byte-level BPE, names in `tokenizer.ggml.pre` select the same split patterns as in llama.cpp, in the
models' original form where llama.cpp has adapted them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

import gptk
from gptk.plugins import Fields, shown
from gptk_plugins.tokenizers import _library, _sentencepiece, bpe
from gptk_plugins.tokenizers._sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary


class GGUFTokenizer(gptk.TokenizerLoader):
    """The tokenizer stored in a GGUF model file."""

    name = "gguf"
    example = "path=model.gguf"
    positional = "path"

    path: Path = Field(description="the GGUF file")

    @classmethod
    def matches(cls, source: str) -> bool:
        return source.endswith(".gguf")

    @classmethod
    def from_source(cls, source: str) -> gptk.TokenizerLoader:
        return cls(path=source)

    def load(self) -> gptk.Tokenizer:
        from gptk_plugins.gguf_file import read_gguf

        try:
            fields = read_gguf(self.path).fields
        except gptk.SourceError as error:
            raise gptk.TokenizerError(str(error)) from None
        return tokenizer_from_gguf(fields, str(self.path))


class _Pre(NamedTuple):
    """How a text is prepared and split before the merges, and what holds where a file is silent."""

    pattern: str
    """Its name in gptk.SPLIT_PATTERNS; unused by SentencePiece."""
    whole_words: bool = False
    add_bos: bool = False
    add_eos: bool = False
    ids: Mapping[str, int] = {}
    """Those of BOS, EOS and the unknown token, by their roles."""
    normalization: Literal["NFC"] | None = None


_GPT2, _DIGITS, _QWEN2 = _Pre("gpt2"), _Pre("gpt2-digits"), _Pre("qwen2")
_LLAMA3 = _Pre("llama3", whole_words=True, add_bos=True)
_PRE = {
    "default": _Pre("llama.cpp"),
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "jais": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "codeshell": _DIGITS,
    "refact": _DIGITS,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "deepseek-r1-qwen": _QWEN2,
    "qwen2": _QWEN2._replace(normalization="NFC"),
    "stablelm2": _QWEN2,
    "falcon3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "tekken": _Pre("tekken", whole_words=True, add_bos=True),
}

_SENTENCEPIECE = {
    "llama": _Pre("", add_bos=True, ids={"bos": 1, "eos": 2, "unknown": 0}),
    "t5": _Pre("", add_eos=True, ids={"eos": 1, "unknown": 2, "padding": 0}),
}

# Files name only one token that ends a text, and chat models have two. llama.cpp, too, recognizes
# these by their text.
_ENDS = {
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
}


class _Fields(Fields):
    """The metadata under `tokenizer.ggml.`, and the chat template."""

    model: str | None = None
    pre: str | None = None
    tokens: list[Any] | None = None
    merges: list[Any] | None = None
    scores: list[float] | None = None
    token_type: list[int] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_sep_token: bool | None = None
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    precompiled_charsmap: list[int] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    eom_token_id: int | None = None
    unknown_token_id: int | None = None
    seperator_token_id: int | None = None  # spelled so in the format
    padding_token_id: int | None = None
    cls_token_id: int | None = None
    mask_token_id: int | None = None
    chat_template: str | None = None


_TEMPLATE_NAMES = {
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> gptk.Tokenizer:
    """The tokenizer described by GGUF metadata, from keys to Python values.

    `source` is for messages. Raises TokenizerError if the tokenizer is of an unsupported kind,
    or if its metadata are incomplete or inconsistent.
    """
    ours = {
        key.removeprefix(prefix): value
        for prefix in ("tokenizer.ggml.", "tokenizer.")
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    fields = _Fields.parse(ours, f"{source}: tokenizer", gptk.TokenizerError)
    kind = _kind(fields, source)
    tokens, types = _tokens(fields, source)
    special = {
        token: number
        for number, token in enumerate(tokens)
        if token and types[number] in (UNKNOWN, CONTROL, USER_DEFINED)
    }

    def token_of(role: str) -> int | None:
        number = getattr(fields, f"{role}_token_id")
        number = kind.ids.get(role) if number is None else number
        return number if number is not None and 0 <= number < len(tokens) else None

    ends = [token_of("eos"), token_of("eot"), token_of("eom")]
    ends += [number for token, number in special.items() if token in _ENDS]
    eos = tuple(dict.fromkeys(number for number in ends if number is not None))
    bos = token_of("bos")
    named = {"bos": bos, "eos": eos[0] if eos else None}
    named |= {name: token_of(role) for name, role in _TEMPLATE_NAMES.items()}
    encoding: gptk.ByteLevelBPE | gptk.PipelineEncoding
    if fields.model == "gpt2":
        encoding = _byte_level(fields, tokens, special, source)
    else:
        encoding = _by_sentencepiece(fields, tokens, types, token_of("unknown"), source)
    return gptk.Tokenizer(
        encoding,
        bos=bos,
        eos=eos,
        add_bos=_chosen(fields.add_bos_token, kind.add_bos) and bos is not None,
        add_eos=_chosen(fields.add_eos_token, kind.add_eos) and token_of("eos") is not None,
        normalization=kind.normalization,
        chat_template=fields.chat_template,
        template_tokens={
            f"{name}_token": tokens[number] for name, number in named.items() if number is not None
        },
    )


def _chosen(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _kind(fields: _Fields, source: str) -> "_Pre":
    """What the kind of the tokenizer says where the file says nothing."""
    if fields.model is None:
        raise gptk.TokenizerError(f"{source} holds no tokenizer; name one with --tokenizer")
    if fields.add_sep_token:
        raise gptk.TokenizerError(
            f"{source}: the tokenizer puts a separator behind each text, as models for embeddings "
            "do, which is not supported; name another with --tokenizer"
        )
    if fields.model in _SENTENCEPIECE:
        return _SENTENCEPIECE[fields.model]
    if fields.model != "gpt2":
        kind = " (WordPiece)" if fields.model == "bert" else ""
        raise gptk.TokenizerError(
            f"{source}: the tokenizer is of the kind {shown(fields.model)}{kind}; only 'gpt2' "
            "(byte-level BPE), 'llama' (SentencePiece) and 't5' (Unigram) are supported; name "
            "another with --tokenizer"
        )
    name = fields.pre or "default"
    if name not in _PRE:
        raise gptk.TokenizerError(
            f"{source}: the pre-tokenizer {shown(name)} is not supported; name another tokenizer "
            f"with --tokenizer; supported: {', '.join(sorted(_PRE))}"
        )
    return _PRE[name]


def _byte_level(
    fields: _Fields, tokens: Sequence[str], special: Mapping[str, int], source: str
) -> gptk.ByteLevelBPE:
    pre = _PRE[fields.pre or "default"]
    return bpe.byte_level_bpe(
        source,
        vocabulary={token: number for number, token in enumerate(tokens) if token},
        merges=_merges(fields, source),
        special=special,
        pattern=gptk.SPLIT_PATTERNS[pre.pattern],
        whole_words=pre.whole_words,
    )


def _by_sentencepiece(
    fields: _Fields,
    tokens: Sequence[str],
    types: Sequence[int],
    unknown: int | None,
    source: str,
) -> gptk.PipelineEncoding:
    scores = fields.scores
    if scores is None or len(scores) != len(tokens):
        found = "no" if scores is None else f"{len(scores)}"
        raise gptk.TokenizerError(
            f"{source}: corrupt tokenizer: {len(tokens)} tokens, but {found} scores"
        )
    if fields.model == "t5" and unknown is None:
        raise gptk.TokenizerError(f"{source}: corrupt tokenizer: no token for unknown characters")
    # GGUF files can have tokens that are not valid UTF-8.
    texts = [t.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for t in tokens]
    vocabulary = Vocabulary(texts, scores, types, unknown)
    try:
        if fields.model == "llama":
            prefix = _chosen(fields.add_space_prefix, True)
            return _sentencepiece.bpe_by_scores(source, vocabulary, prefix=prefix)
        return _sentencepiece.unigram(
            source,
            vocabulary,
            prefix=_chosen(fields.add_space_prefix, False),
            merge_spaces=_chosen(fields.remove_extra_whitespaces, False),
            charsmap=_sentencepiece.charsmap_of(fields.precompiled_charsmap),
        )
    except _library.NotInstalledError:
        raise
    except Exception as error:  # of the library, which has no class for its errors
        reason = " ".join(str(error).split())[:200]
        raise gptk.TokenizerError(f"{source}: corrupt tokenizer: {reason}") from None


def _tokens(fields: _Fields, source: str) -> tuple[list[str], list[int]]:
    """The tokens, and the type of each."""
    corrupt = f"{source}: corrupt tokenizer"
    tokens = _texts(fields.tokens, "tokens", corrupt)
    types = [1] * len(tokens) if fields.token_type is None else fields.token_type
    if len(types) != len(tokens):
        raise gptk.TokenizerError(f"{corrupt}: {len(tokens)} tokens, but {len(types)} token types")
    seen: set[str] = set()
    for token in filter(None, tokens):
        if token in seen:
            raise gptk.TokenizerError(f"{corrupt}: the token {shown(token)} occurs twice")
        seen.add(token)
    return tokens, types


def _merges(fields: _Fields, source: str) -> list[tuple[str, str]]:
    """The merges as pairs."""
    corrupt = f"{source}: corrupt tokenizer"
    merges = []
    for index, line in enumerate(_texts(fields.merges, "merges", corrupt), 1):
        left, _, right = line.partition(" ")
        if not left or not right:
            raise gptk.TokenizerError(f"{corrupt}: merge {index} is {shown(line)}")
        merges.append((left, right))
    return merges


def _texts(values: list[Any] | None, key: str, corrupt: str) -> list[str]:
    if values is None:
        raise gptk.TokenizerError(f"{corrupt}: no tokenizer.ggml.{key}")
    if not all(isinstance(value, str) for value in values):
        raise gptk.TokenizerError(f"{corrupt}: {key} are no texts")
    return values
