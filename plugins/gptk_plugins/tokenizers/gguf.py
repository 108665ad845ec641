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
from gptk_plugins.gguf_file import read_gguf


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
        try:
            fields = read_gguf(self.path).fields
        except gptk.SourceError as error:
            raise gptk.TokenizerError(str(error)) from None
        return tokenizer_from_gguf(fields, str(self.path))


class _Pre(NamedTuple):
    """How a text is prepared and split before the merges."""

    pattern: str
    """Its name in `gptk_plugins.tokenizers.bpe`."""
    whole_words: bool = False
    add_bos: bool = False
    normalization: Literal["NFC"] | None = None


_GPT2, _DIGITS, _QWEN2 = _Pre("GPT2"), _Pre("SMOLLM"), _Pre("QWEN2")
_LLAMA3 = _Pre("LLAMA3", whole_words=True, add_bos=True)
_PRE = {
    "default": _GPT2,
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
    "tekken": _Pre("TEKKEN", whole_words=True, add_bos=True),
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


def tokenizer_from_gguf(fields: Mapping[str, Any], source: str) -> gptk.Tokenizer:
    """The tokenizer described by GGUF metadata, from keys to Python values.

    `source` is for messages. Raises TokenizerError if the tokenizer is of an unsupported kind,
    or if its metadata are incomplete or inconsistent.
    """
    from gptk_plugins.tokenizers import bpe

    model = fields.get("tokenizer.ggml.model")
    if model is None:
        raise gptk.TokenizerError(f"{source} holds no tokenizer; name one with --tokenizer")
    if model != "gpt2":
        kinds = {"llama": " (SentencePiece)", "bert": " (WordPiece)", "t5": " (Unigram)"}
        raise gptk.TokenizerError(
            f"{source}: the tokenizer is of the kind {model!r}{kinds.get(model, '')}; only 'gpt2' "
            "(byte-level BPE) is supported; name another with --tokenizer"
        )
    name = fields.get("tokenizer.ggml.pre") or "default"
    if name not in _PRE:
        raise gptk.TokenizerError(
            f"{source}: the pre-tokenizer {name!r} is not supported; name another tokenizer with "
            f"--tokenizer; supported: {', '.join(sorted(_PRE))}"
        )
    pre = _PRE[name]
    tokens, merges, types = _lists(fields, source)
    texts = {token: number for number, token in enumerate(tokens) if token}
    special = {
        token: number
        for token, number in texts.items()
        if types[number] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }

    def token_of(role: str) -> int | None:
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        return int(number) if number is not None and 0 <= number < len(tokens) else None

    named = [token_of("eos"), token_of("eot"), token_of("eom")]
    known = [number for token, number in special.items() if token in _ENDS]
    bos = token_of("bos")
    return gptk.Tokenizer(
        bpe.byte_level_bpe(
            source,
            vocabulary=texts,
            merges=merges,
            special=special,
            pattern=getattr(bpe, pre.pattern),
            whole_words=pre.whole_words,
        ),
        bos=bos,
        eos=tuple(dict.fromkeys(number for number in (*named, *known) if number is not None)),
        add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pre.add_bos)) and bos is not None,
        normalization=pre.normalization,
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _lists(
    fields: Mapping[str, Any], source: str
) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """The tokens, the merges as pairs, and the type of each token."""
    for key in ("tokens", "merges"):
        if not isinstance(fields.get(f"tokenizer.ggml.{key}"), list):
            raise gptk.TokenizerError(f"{source}: corrupt tokenizer: no tokenizer.ggml.{key}")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise gptk.TokenizerError(
            f"{source}: corrupt tokenizer: {len(tokens)} tokens, but {len(types)} token types"
        )
    named = [token for token in tokens if token]
    if len(set(named)) < len(named):
        repeated = next(token for token in named if named.count(token) > 1)
        raise gptk.TokenizerError(
            f"{source}: corrupt tokenizer: the token {repeated!r} occurs twice"
        )
    merges = []
    for index, line in enumerate(fields["tokenizer.ggml.merges"], 1):
        left, _, right = line.partition(" ")
        if not left or not right:
            raise gptk.TokenizerError(f"{source}: corrupt tokenizer: merge {index} is {line!r}")
        merges.append((left, right))
    return tokens, merges, types
