"""A Hugging Face tokenizer: `tokenizer.json` and the small files beside it.

Byte-level BPE is supported, with the same tokens as the `tokenizers` library; a component that
would give other tokens is refused by name. Added tokens are found before the text is normalized,
including those marked `normalized`: this differs only if a Unicode normal form creates or breaks
an added token.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import gptk

FILE = "tokenizer.json"
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


def load_tokenizer_json(path: Path) -> gptk.Tokenizer:
    """The tokenizer in a tokenizer.json.

    Files in the same directory, if they exist, define which tokens begin and end a text and the
    chat template: tokenizer_config.json, special_tokens_map.json, generation_config.json,
    config.json and chat_template.jinja.

    Raises TokenizerError if a file is corrupt or the tokenizer is of an unsupported kind.
    """
    settings = _read_json(path)
    if settings is None:
        raise gptk.TokenizerError(f"no such file: {path}")
    try:
        return _tokenizer(settings, path)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise gptk.TokenizerError(
            f"{path} is not the tokenizer.json of a byte-level BPE ({reason})"
        ) from None


def _tokenizer(settings: Mapping[str, Any], path: Path) -> gptk.Tokenizer:
    from gptk_plugins.tokenizers import bpe

    source = str(path)
    model = settings["model"]
    _check_model(model, source)
    _check_decoder(settings.get("decoder"), source)
    vocabulary: dict[str, int] = model["vocab"]
    special = dict(_added_tokens(settings.get("added_tokens") or (), vocabulary, source))
    encoding = bpe.byte_level_bpe(
        source,
        vocabulary=vocabulary,
        merges=map(_merge, model["merges"]),
        special=special,
        pattern=_pattern(settings.get("pre_tokenizer"), source),
        whole_words=bool(model.get("ignore_merges")),
    )
    first = _first_token(settings.get("post_processor"), source)
    companions = _CompanionFiles(path.parent, {**vocabulary, **special})
    bos = companions.ids("bos") if first is None else [first]
    return gptk.Tokenizer(
        encoding,
        bos=bos[0] if bos else None,
        eos=tuple(companions.ids("eos")),
        add_bos=first is not None,
        normalization=_normalization(settings.get("normalizer"), source),
        chat_template=companions.chat_template(),
        template_tokens=companions.template_tokens(),
    )


def _check_model(model: Mapping[str, Any], source: str) -> None:
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise _unsupported(source, f"the model {kind}")
    for option in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
    ):
        if model.get(option):
            raise _unsupported(source, f"{option}={model[option]!r}")
    if model.get("unk_token") and not _has_all_bytes(model["vocab"]):
        raise _unsupported(source, f"unk_token={model['unk_token']!r} for absent bytes")


def _has_all_bytes(vocabulary: Mapping[str, int]) -> bool:
    from gptk_plugins.tokenizers import bpe

    return vocabulary.keys() >= bpe.ALPHABET.keys()


def _check_decoder(node: Mapping[str, Any] | None, source: str) -> None:
    for decoder in _steps(node, "decoders"):
        if decoder["type"] != "ByteLevel":
            raise _unsupported(source, f"the decoder {decoder['type']}")


def _merge(merge: str | list[str]) -> tuple[str, str]:
    """A merge: "a b" in older files, ["a", "b"] in newer ones."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _added_tokens(
    nodes: Iterable[Mapping[str, Any]], vocabulary: Mapping[str, int], source: str
) -> Iterator[tuple[str, int]]:
    for node in nodes:
        content: str = node["content"]
        for option in ("single_word", "lstrip", "rstrip"):
            if node.get(option):
                raise _unsupported(source, f"{option} of the added token {content!r}")
        if content:
            yield content, vocabulary.get(content, node["id"])


def _normalization(node: Mapping[str, Any] | None, source: str) -> Normalization | None:
    kinds = [step["type"] for step in _steps(node, "normalizers")]
    if not kinds:
        return None
    if len(kinds) > 1 or kinds[0] not in _NORMAL_FORMS:
        raise _unsupported(source, f"the normalizer {' + '.join(kinds)}")
    return _NORMAL_FORMS[kinds[0]]


def _pattern(node: Mapping[str, Any] | None, source: str) -> str:
    """The pre-tokenizer as one pattern, whose matches are the pieces of a text."""
    from gptk_plugins.tokenizers import bpe

    steps = _steps(node, "pretokenizers")
    kinds = [step["type"] for step in steps]
    what = f"the pre-tokenizer {' + '.join(kinds) or 'null'}"
    if not steps or kinds[-1] != "ByteLevel":
        raise _unsupported(source, what)
    *splits, byte_level = steps
    if byte_level.get("add_prefix_space", True):
        raise _unsupported(source, "add_prefix_space=true")
    match splits, bool(byte_level.get("use_regex", True)):
        case [], True:
            return bpe.GPT2
        case [], False:
            return r"[\s\S]+"
        case [{"type": "Digits"} as digits], True:
            return bpe.digits_then_gpt2(individual=bool(digits.get("individual_digits")))
        case [{"type": "Split"} as split], False:
            return _split_pattern(split, source)
    raise _unsupported(source, f"{what} with use_regex={byte_level.get('use_regex', True)}")


def _split_pattern(split: Mapping[str, Any], source: str) -> str:
    behavior, invert = split["behavior"], bool(split.get("invert"))
    pattern = split["pattern"].get("Regex")
    if pattern is None:
        raise _unsupported(source, f"Split by the text {split['pattern'].get('String')!r}")
    match behavior, invert:
        case "Isolated", _:
            # The text between matches is a piece, too.
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
        case "Removed", True:
            return str(pattern)
    raise _unsupported(source, f"Split with behavior={behavior} and invert={invert}")


def _first_token(node: Mapping[str, Any] | None, source: str) -> int | None:
    """The token that the post-processor puts in front of a text."""
    first = None
    for processor in _steps(node, "processors"):
        match processor:
            case {"type": "ByteLevel"}:
                pass
            case {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
                pass
            case {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": name}}, {"Sequence": _}],
                "special_tokens": tokens,
            } if first is None:
                [first] = tokens[name]["ids"]
            case {"type": "TemplateProcessing"}:
                raise _unsupported(source, "a template with more than one token before the text")
            case _:
                raise _unsupported(source, f"the post-processor {processor['type']}")
    return first


class _CompanionFiles:
    """What the other files in the directory of a tokenizer.json say about the tokenizer."""

    def __init__(self, folder: Path, ids: Mapping[str, int]) -> None:
        self._folder = folder
        self._ids = ids
        self._numbers = set(ids.values())
        names = ("tokenizer_config", "special_tokens_map", "generation_config", "config")
        self._files = {name: _read_json(folder / f"{name}.json") or {} for name in names}

    def ids(self, role: str) -> list[int]:
        """The ids of the tokens named for a role, "bos" or "eos", each once, if in the vocabulary.

        Those that generation uses come first; a chat model's files can each name another token.
        """
        found = []
        for name in ("generation_config", "tokenizer_config", "special_tokens_map"):
            found += self._named(name, role)
        return list(dict.fromkeys(found or self._named("config", role)))

    def _named(self, name: str, role: str) -> list[int]:
        numbers = self._files[name].get(f"{role}_token_id")
        token = self._files[name].get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = numbers if isinstance(numbers, list) else [numbers, self._ids.get(text or "")]
        return [number for number in found if number in self._numbers]

    def template_tokens(self) -> dict[str, str] | None:
        """The bos_token and eos_token that transformers passes to the chat template.

        They come from the tokenizer's own files, and can differ from the tokens that generation
        begins and ends with, or be missing.
        """
        named = self._files["tokenizer_config"]
        if "added_tokens_decoder" not in named:  # written by older versions, which read the map
            named = named | self._files["special_tokens_map"]
        if not named:
            return None
        tokens = {}
        for role in ("bos_token", "eos_token"):
            token = named.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokens[role] = text
        return tokens

    def chat_template(self) -> str | None:
        """The chat template; of several, the one called "default"."""
        path = self._folder / "chat_template.jinja"
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise gptk.TokenizerError(f"cannot read {path}: {error}") from None
        template = self._files["tokenizer_config"].get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template if isinstance(template, str) else None


def _steps(node: Mapping[str, Any] | None, plural: str) -> list[Mapping[str, Any]]:
    """A component as the list of its steps. plural: the key of the list in a Sequence."""
    if node is None:
        return []
    return list(node[plural]) if node["type"] == "Sequence" else [node]


def _read_json(path: Path) -> Any:
    """The content of a JSON file, or None if it does not exist. Raises TokenizerError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise gptk.TokenizerError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise gptk.TokenizerError(f"{path} is corrupt or cut off: {error}") from None


def _unsupported(source: str, what: str) -> gptk.TokenizerError:
    return gptk.TokenizerError(
        f"{source}: {what} is not supported; name another tokenizer with --tokenizer"
    )
