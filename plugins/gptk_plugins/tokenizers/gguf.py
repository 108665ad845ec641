"""The tokenizer in a GGUF file: its metadata under `tokenizer.ggml`.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names in `tokenizer.ggml.pre`
select the same split patterns as in llama.cpp, in the models' original form where llama.cpp has
adapted them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

import gptk
from gptk.plugins import Fields, shown
from gptk_plugins.tokenizers import bpe


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
    """How a text is prepared and split before the merges."""

    pattern: str
    """Its name in gptk.SPLIT_PATTERNS."""
    whole_words: bool = False
    add_bos: bool = False
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

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type

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
    token_type: list[int] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_sep_token: bool | None = None
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
    pre = _supported(fields, source)
    tokens, merges, types = _lists(fields, source)
    texts = {token: number for number, token in enumerate(tokens) if token}
    special = {
        token: number
        for token, number in texts.items()
        if types[number] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }

    def token_of(role: str) -> int | None:
        number = getattr(fields, f"{role}_token_id")
        return number if number is not None and 0 <= number < len(tokens) else None

    ends = [token_of("eos"), token_of("eot"), token_of("eom")]
    ends += [number for token, number in special.items() if token in _ENDS]
    eos = tuple(dict.fromkeys(number for number in ends if number is not None))
    bos = token_of("bos")
    named = {"bos": bos, "eos": eos[0] if eos else None}
    named |= {name: token_of(role) for name, role in _TEMPLATE_NAMES.items()}
    return gptk.Tokenizer(
        bpe.byte_level_bpe(
            source,
            vocabulary=texts,
            merges=merges,
            special=special,
            pattern=gptk.SPLIT_PATTERNS[pre.pattern],
            whole_words=pre.whole_words,
        ),
        bos=bos,
        eos=eos,
        add_bos=(pre.add_bos if fields.add_bos_token is None else fields.add_bos_token)
        and bos is not None,
        normalization=pre.normalization,
        chat_template=fields.chat_template,
        template_tokens={
            f"{name}_token": tokens[number] for name, number in named.items() if number is not None
        },
    )


def _supported(fields: _Fields, source: str) -> _Pre:
    if fields.model is None:
        raise gptk.TokenizerError(f"{source} holds no tokenizer; name one with --tokenizer")
    if fields.model != "gpt2":
        kinds = {"llama": " (SentencePiece)", "bert": " (WordPiece)", "t5": " (Unigram)"}
        raise gptk.TokenizerError(
            f"{source}: the tokenizer is of the kind {shown(fields.model)}"
            f"{kinds.get(fields.model, '')}; only 'gpt2' (byte-level BPE) is supported; name "
            "another with --tokenizer"
        )
    if fields.add_eos_token or fields.add_sep_token:
        raise gptk.TokenizerError(
            f"{source}: the tokenizer ends each text with a token, as models for embeddings do, "
            "which is not supported; name another with --tokenizer"
        )
    name = fields.pre or "default"
    if name not in _PRE:
        raise gptk.TokenizerError(
            f"{source}: the pre-tokenizer {shown(name)} is not supported; name another tokenizer "
            f"with --tokenizer; supported: {', '.join(sorted(_PRE))}"
        )
    return _PRE[name]


def _lists(fields: _Fields, source: str) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """The tokens, the merges as pairs, and the type of each token."""
    corrupt = f"{source}: corrupt tokenizer"
    tokens, lines = fields.tokens, fields.merges
    if tokens is None or lines is None:
        key = "tokens" if tokens is None else "merges"
        raise gptk.TokenizerError(f"{corrupt}: no tokenizer.ggml.{key}")
    if not all(isinstance(item, str) for items in (tokens, lines) for item in items):
        raise gptk.TokenizerError(f"{corrupt}: tokens or merges are no texts")
    types = [1] * len(tokens) if fields.token_type is None else fields.token_type
    if len(types) != len(tokens):
        raise gptk.TokenizerError(f"{corrupt}: {len(tokens)} tokens, but {len(types)} token types")
    seen: set[str] = set()
    for token in filter(None, tokens):
        if token in seen:
            raise gptk.TokenizerError(f"{corrupt}: the token {shown(token)} occurs twice")
        seen.add(token)
    merges = []
    for index, line in enumerate(lines, 1):
        left, _, right = line.partition(" ")
        if not left or not right:
            raise gptk.TokenizerError(f"{corrupt}: merge {index} is {shown(line)}")
        merges.append((left, right))
    return tokens, merges, types
