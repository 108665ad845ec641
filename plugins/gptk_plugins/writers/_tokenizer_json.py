"""A tokenizer as tokenizer.json and tokenizer_config.json, for transformers.

`tokenizers` needs a list of merges, and tiktoken keeps none: it joins the two neighbours whose
bytes together are the token of lowest rank. A token's merge is recovered by merging its own bytes
with the tokens of lower rank, which leaves its two halves. If more than two parts are left, as in
vocabularies that were not made by merging alone, this order of merges never forms the token; then
every way to split it in two becomes a merge, and `ignore_merges` is set, so that a piece that is a
token stays whole.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gptk
from gptk_plugins.tokenizers.huggingface import load_tokenizer_json


def write_tokenizer(folder: Path, tokenizer: gptk.Tokenizer, context_length: int) -> None:
    """Write the two files to `folder`, which has generation_config.json already.

    Raises TokenizerError for a tokenizer that they cannot hold: the tokenizer that is read back
    from them must be the same.
    """
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, context_length))
    again = load_tokenizer_json(folder / "tokenizer.json")
    for part, value in _parts(tokenizer).items():
        if _parts(again)[part] != value:
            raise _refusal(f"reading it back would change its {part}")
    _check_template_tokens(tokenizer, again)


def tokenizer_json(tokenizer: gptk.Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. Raises TokenizerError for what it cannot hold."""
    encoding = tokenizer.encoding
    if isinstance(encoding, gptk.PipelineEncoding):
        around = _post_processor(tokenizer, encoding.vocabulary())
        return {**json.loads(encoding.to_json()), "post_processor": around}
    ranks: Mapping[bytes, int] = encoding._mergeable_ranks
    merges, all_merged = _merges(ranks)
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    vocabulary = _vocabulary(encoding, all_merged)
    normal_form = tokenizer.normalization
    options, splits = tokenizer.special_options or {}, _splits_special_tokens(tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token, number, options.get(token, ()), splits) for token, number in special
        ],
        "normalizer": {"type": normal_form} if normal_form else None,
        "pre_tokenizer": _pre_tokenizer(encoding._pat_str),
        "post_processor": _post_processor(tokenizer, vocabulary),
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": not all_merged,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [[_spelled(left), _spelled(right)] for left, right in merges],
        },
    }


def _added_token(
    token: str, number: int, options: Sequence[str], splits_special: bool
) -> dict[str, Any]:
    return {
        "id": number,
        "content": token,
        **{name: name in options for name in ("single_word", "lstrip", "rstrip", "normalized")},
        "special": "as_text" in options or not splits_special,
    }


def _splits_special_tokens(tokenizer: gptk.Tokenizer) -> bool:
    """Whether tokens that are special to `tokenizers` are ordinary text in a prompt."""
    if isinstance(tokenizer.encoding, gptk.PipelineEncoding):
        return tokenizer.encoding.splits_special_tokens
    return any("as_text" in options for options in (tokenizer.special_options or {}).values())


# --- Vocabulary and merges -------------------------------------------------------------------

_CHARACTERS = {byte: character for character, byte in gptk.GPT2_ALPHABET.items()}


def _spelled(token: bytes) -> str:
    """Bytes in GPT-2's alphabet."""
    return "".join(_CHARACTERS[byte] for byte in token)


def _vocabulary(encoding: Any, all_merged: bool) -> dict[str, int]:
    vocabulary = {_spelled(token): rank for token, rank in encoding._mergeable_ranks.items()}
    # Tokens that only decode. No merge forms them, but `ignore_merges` looks whole pieces up in the
    # vocabulary; so they get a spelling that no piece has and that decodes to their bytes.
    for number, token in encoding.decode_only.items():
        name = _spelled(token)
        if not all_merged or name in vocabulary:
            name = token.decode("utf-8", errors="replace")
            if (
                name.encode() != token
                or name in vocabulary
                or set(name) <= gptk.GPT2_ALPHABET.keys()
            ):
                raise _refusal(f"token {number} cannot be distinguished from another")
        vocabulary[name] = number
    for name, number in encoding._special_tokens.items():
        if vocabulary.setdefault(name, number) != number:
            raise _refusal(f"the special token {name!r} is spelled like another token")
    return vocabulary


def _merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The list of merges, and whether they form all tokens."""
    merges: list[tuple[bytes, bytes]] = []
    all_merged = True
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        halves = _merged(token, ranks, rank)
        if len(halves) == 2 and all(half in ranks for half in halves):
            merges.append((halves[0], halves[1]))
            continue
        all_merged = False
        splits = ((token[:end], token[end:]) for end in range(1, len(token)))
        merges += [split for split in splits if split[0] in ranks and split[1] in ranks]
    return merges, all_merged


def _merged(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """A token's bytes merged as tiktoken does it, by tokens of a rank below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        best = min(found)
        if best >= limit:
            break
        i = found.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# --- Splitting -------------------------------------------------------------------------------

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_BYTES_ONLY = _BYTE_LEVEL | {"use_regex": False}
_GPT2_SPLIT = _BYTE_LEVEL | {"use_regex": True}
_KNOWN = {
    gptk.SPLIT_PATTERNS["gpt2"]: [_GPT2_SPLIT],
    gptk.SPLIT_PATTERNS["gpt2-digits"]: [
        {"type": "Digits", "individual_digits": True},
        _GPT2_SPLIT,
    ],
    gptk.SPLIT_PATTERNS["gpt2-numbers"]: [
        {"type": "Digits", "individual_digits": False},
        _GPT2_SPLIT,
    ],
}
"""Patterns that correspond to built-in pre-tokenizers of tokenizer.json."""


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    steps = _KNOWN.get(pattern) or [
        # A piece is what the pattern matches; everything else is dropped.
        {
            "type": "Split",
            "pattern": {"Regex": _for_oniguruma(pattern)},
            "behavior": "Removed",
            "invert": True,
        },
        _BYTES_ONLY,
    ]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _for_oniguruma(pattern: str) -> str:
    """A split pattern of tiktoken for the regex library of `tokenizers`."""
    try:
        return gptk.SplitPattern.parse(pattern, "tiktoken").written("oniguruma")
    except gptk.TokenizerError as error:
        raise _refusal(str(error)) from None


def _post_processor(
    tokenizer: gptk.Tokenizer, vocabulary: Mapping[str, int]
) -> dict[str, Any] | None:
    first = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    last = [*tokenizer.eos[:1]] if tokenizer.add_eos else []
    if not first and not last:
        return None
    names = {number: name for name, number in vocabulary.items() if number in (*first, *last)}
    for what, ids in (("first", first), ("last", last)):
        if ids and ids[0] not in names:
            raise _refusal(f"its {what} token {ids[0]} is not in its vocabulary")
    text, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    before = [{"SpecialToken": {"id": names[number], "type_id": 0}} for number in first]
    after = [{"SpecialToken": {"id": names[number], "type_id": 0}} for number in last]
    return {
        "type": "TemplateProcessing",
        "single": [*before, text, *after],
        "pair": [*before, text, second, *after],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for number, name in names.items()
        },
    }


# --- tokenizer_config.json --------------------------------------------------------------------


def _tokenizer_config(tokenizer: gptk.Tokenizer, context_length: int) -> dict[str, Any]:
    # Only special tokens: transformers makes every token that is named here a special one.
    names = {number: name for name, number in tokenizer.encoding._special_tokens.items()}
    special = {*names.values(), ""}
    named = {role: text for role, text in _template_tokens(tokenizer).items() if text in special}
    ends = [names[token] for token in tokenizer.eos if token in names]
    if ends and tokenizer.template_tokens is None:
        named["eos_token"] = ends[0]
    extra = {role: text for role, text in named.items() if not role.endswith("_token")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **({"split_special_tokens": True} if _splits_special_tokens(tokenizer) else {}),
        **{role: text for role, text in named.items() if role not in extra},
        **({"extra_special_tokens": extra} if extra else {}),
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    }


def _template_tokens(tokenizer: gptk.Tokenizer) -> dict[str, str]:
    """What a chat template knows by the names of tokens, see `gptk.Tokenizer.template_tokens`."""
    if tokenizer.template_tokens is not None:
        return dict(tokenizer.template_tokens)
    ids = {"bos_token": tokenizer.bos, "eos_token": next(iter(tokenizer.eos), None)}
    return {role: tokenizer.decode([token]) for role, token in ids.items() if token is not None}


def _check_template_tokens(tokenizer: gptk.Tokenizer, again: gptk.Tokenizer) -> None:
    """Raise TokenizerError if the chat template names a token that is lost, or another one now."""
    now, template = _template_tokens(again), again.chat_template or ""
    for role, text in _template_tokens(tokenizer).items():
        if now.get(role) != text and re.search(rf"\b{re.escape(role)}\b", template):
            raise _refusal(
                f"its chat template uses {role}, {gptk.plugins.shown(text)}, which is no special "
                "token"
            )


def _parts(tokenizer: gptk.Tokenizer) -> dict[str, object]:
    """The parts that two tokenizers must share to be equal, by name, without the split pattern."""
    encoding = tokenizer.encoding
    ends: dict[str, object] = {
        "first token": (tokenizer.bos, tokenizer.add_bos),
        "last tokens": (tokenizer.eos, tokenizer.add_eos),
        "chat template": tokenizer.chat_template,
    }
    if isinstance(encoding, gptk.PipelineEncoding):
        return ends | {
            "pipeline": json.loads(encoding.to_json()),
            "split special tokens": encoding.splits_special_tokens,
        }
    encoding = gptk.ByteLevelBPE.of(encoding)
    return ends | {
        "tokens": encoding._mergeable_ranks,
        "special tokens": encoding._special_tokens,
        "decoded tokens": encoding.decode_only,
        "normal form": tokenizer.normalization,
        "options of special tokens": {
            token: set(how) for token, how in (tokenizer.special_options or {}).items() if how
        },
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refusal(why: str) -> gptk.TokenizerError:
    return gptk.TokenizerError(f"this tokenizer cannot be written as tokenizer.json: {why}")
