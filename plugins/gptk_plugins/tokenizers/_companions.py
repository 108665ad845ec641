"""The files beside a tokenizer.json, read as `AutoTokenizer` of transformers 5 reads them.

    tokenizer_config.json    added tokens and their options, named special tokens, chat template
    special_tokens_map.json  named special tokens; read only if tokenizer_config.json has no
                             added_tokens_decoder, as written by older versions
    added_tokens.json        more added tokens, likewise
    chat_template.jinja      the chat template, before that of tokenizer_config.json
    generation_config.json   the ids that begin and end a text in generation
    config.json              the same, where there is no generation_config.json

Where tokenizer_config.json names a class of transformers (`tokenizer_class`), this class may split
texts in its own way; gptk always splits as tokenizer.json says.
"""

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field

import gptk
from gptk.plugins import Fields, read_json, read_text, shown

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that have a name; a model's own files may name more, all end in `_token`."""

Option = Literal["normalized", "lstrip", "rstrip", "single_word", "as_text"]
_OPTIONS: tuple[Option, ...] = ("normalized", "lstrip", "rstrip", "single_word")
Id = Annotated[int, Field(ge=0, lt=2**32)]


class AddedToken(Fields):
    """A token that is looked for in a text before the text is split."""

    content: str
    normalized: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = False

    def resolved(self) -> "AddedToken":
        """With a value for `normalized`: by default special tokens are not."""
        if self.normalized is not None:
            return self
        return self.model_copy(update={"normalized": not self.special})


def _as_token(value: Any) -> Any:
    """A token that is named by its text alone is special."""
    return {"content": value, "special": True} if isinstance(value, str) else value


Token = Annotated[AddedToken, BeforeValidator(_as_token)]


class NumberedToken(AddedToken):
    """An added token of a tokenizer.json."""

    id: Id


class _NamedTemplate(Fields):
    name: str
    template: str


class _TokenizerConfig(Fields):
    model_config = ConfigDict(extra="allow")  # model-specific tokens, such as image_token

    added_tokens_decoder: dict[str, AddedToken] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    additional_special_tokens: list[Token] | None = None
    split_special_tokens: bool | None = None
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None
    fast_tokenizer_files: list[str] | None = None


class _SpecialTokensMap(Fields):
    model_config = ConfigDict(extra="allow")

    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    additional_special_tokens: list[Token] | None = None


class _Roles(Fields):
    """The ids of config.json and generation_config.json."""

    bos_token_id: Id | list[Id] | None = None
    eos_token_id: Id | list[Id] | None = None


class _Named(Fields):
    """A single named token."""

    token: Token


Model = TypeVar("Model", bound=Fields)


class Companions:
    """What the other files in the directory of a tokenizer.json say about the tokenizer.

    Raises TokenizerError for a file that cannot be read or has a field of a wrong type.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = self._read("tokenizer_config", _TokenizerConfig) or _TokenizerConfig()
        self._legacy = self._config.added_tokens_decoder is None
        old = self._read("special_tokens_map", _SpecialTokensMap) if self._legacy else None
        self._map = old or _SpecialTokensMap()
        self.split_special_tokens = bool(self._config.split_special_tokens)

    def _read(self, name: str, model: type[Model]) -> Model | None:
        path = self._folder / f"{name}.json"
        if not os.path.lexists(path):
            return None
        return model.parse(read_json(path, gptk.TokenizerError), path, gptk.TokenizerError)

    @functools.cached_property
    def named(self) -> dict[str, AddedToken]:
        """The special tokens by their names, bos_token and so on, in transformers' order."""
        found: dict[str, AddedToken] = {}
        for source, path in ((self._config, "tokenizer_config"), (self._map, "special_tokens_map")):
            for name, value in (source.__pydantic_extra__ or {}).items():
                if not name.endswith("_token") or isinstance(value, bool | int):
                    continue  # add_bos_token and the like
                if value is None:
                    found.pop(name, None)
                else:
                    where = f"{self._folder / path}.json: {name}"
                    found[name] = _Named.parse({"token": value}, where, gptk.TokenizerError).token
            if isinstance(source.extra_special_tokens, dict):
                found |= source.extra_special_tokens
        return {name: found[name] for name in (*NAMED, *found) if name in found}

    def added_tokens(self, own: Iterable["NumberedToken"]) -> Iterator[AddedToken]:
        """The tokens that are added after those of tokenizer.json itself, `own`, in order; some of
        them change the options of one that is there."""
        own = list(own)
        decoder = self._older_decoder(own) if self._legacy else self._decoder()
        chosen = [decoder[number] for number in sorted(decoder)]
        there = {token.content for token in (*own, *chosen)}
        for token in (*self.named.values(), *self._extra()):
            if token.content not in there and token not in chosen:
                chosen.append(token)
        names = {token.content for token in self.named.values()}
        for token in chosen:
            # The normal form is decided before: a token is not normalized because it is special.
            special = token.special or token.content in names
            yield token.resolved().model_copy(update={"special": special})

    def _decoder(self) -> dict[int, AddedToken]:
        decoder = self._config.added_tokens_decoder or {}
        for number in decoder:
            if not (number.isascii() and number.isdigit() and len(number) < 12):
                path = self._folder / "tokenizer_config.json"
                raise gptk.TokenizerError(f"{path}: its added token {shown(number)} has no id")
        return {int(number): token for number, token in decoder.items()}

    def _older_decoder(self, own: Sequence["NumberedToken"]) -> dict[int, AddedToken]:
        found: dict[int, AddedToken] = {}
        path = self._folder / "added_tokens.json"
        if os.path.lexists(path):
            special = {self.named[name].content for name in NAMED if name in self.named}
            special |= {token.content for token in self._extra_by_new_name()}
            content = {"ids": read_json(path, gptk.TokenizerError)}
            ids = _AddedTokens.parse(content, path, gptk.TokenizerError).ids
            for text, number in ids.items():
                found[number] = AddedToken(content=text, special=text in special)
        return found | {token.id: token for token in own}

    def _extra(self) -> list[AddedToken]:
        """The special tokens without a name."""
        return self._extra_by_new_name() or self._map.additional_special_tokens or []

    def _extra_by_new_name(self) -> list[AddedToken]:
        """Those of them that are called `extra`, or `additional` in tokenizer_config.json."""
        config, older = self._config, self._map
        if isinstance(older.extra_special_tokens, dict):  # these have names
            return []
        extra, additional = config.extra_special_tokens, config.additional_special_tokens
        if isinstance(extra, dict):
            extra = None
            additional = None if older.additional_special_tokens else additional
        return [*(extra or additional or []), *(older.extra_special_tokens or [])]

    def template_tokens(self) -> dict[str, str] | None:
        """The named tokens that transformers passes to the chat template; None without files."""
        texts = {name: token.content for name, token in self.named.items()}
        exists = ("tokenizer_config", "special_tokens_map")
        there = any(os.path.lexists(self._folder / f"{name}.json") for name in exists)
        return texts if there else None

    def ids(self, role: str, ids: Mapping[str, int]) -> list[int]:
        """The ids of the tokens for a role, "bos" or "eos", each once, if in the vocabulary.

        Those that generation uses, as transformers' `generate` does; if there are none, the token
        that is named so for chat templates.
        """
        generation = self._read("generation_config", _Roles)
        config = self._read("config", _Roles) or _Roles()
        named = self.named.get(f"{role}_token")
        known = set(ids.values())
        for found in (
            _listed(config if generation is None else generation, role),
            [] if named is None else [ids.get(named.content, -1)],
            _listed(config, role),
        ):
            if there := [number for number in dict.fromkeys(found) if number in known]:
                return there
        return []

    def chat_template(self) -> str | None:
        """The chat template; of several, the one called "default"."""
        path = self._folder / "chat_template.jinja"
        if os.path.lexists(path):
            return read_text(path, gptk.TokenizerError)
        template = self._config.chat_template
        if isinstance(template, list):
            template = {entry.name: entry.template for entry in template}
        return template.get("default") if isinstance(template, dict) else template

    def tokenizer_file(self) -> str:
        """The name of the tokenizer.json: of several for versions of transformers, the newest."""
        found = [
            ([int(part) for part in match[1].split(".")], match[0])
            for name in self._config.fast_tokenizer_files or ()
            if (match := re.fullmatch(r"tokenizer\.(\d{1,6}(?:\.\d{1,6})*)\.json", name))
        ]
        return max(found)[1] if found else "tokenizer.json"


def _listed(roles: _Roles, role: str) -> list[int]:
    value: int | list[int] | None = getattr(roles, f"{role}_token_id")
    return [] if value is None else value if isinstance(value, list) else [value]


class _AddedTokens(Fields):
    ids: dict[str, Id]


class AddedVocabulary:
    """The ids of added tokens, given as `tokenizers` gives them: not those that files name."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._vocabulary = vocabulary
        self.ids: dict[str, int] = {}
        self._tokens: dict[int, AddedToken] = {}
        self._special: set[str] = set()

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Add tokens: one of the vocabulary keeps its id, others get the next free ones."""
        size = len(self._vocabulary)
        highest = max(self._tokens, default=-1)
        following = highest + 1 if self._tokens and (highest >= size or not size) else size
        for token in (token.resolved() for token in tokens if token.content):
            number = self.ids.get(token.content, self._vocabulary.get(token.content))
            if number is None:
                number, following = following, following + 1
            self.ids[token.content] = number
            self._tokens[number] = token
            if token.special:  # it stays special if another one with its text is not
                self._special.add(token.content)

    def options(self, *, split_special: bool) -> dict[str, tuple[Option, ...]]:
        """How tokens are found in a text, for `gptk.Tokenizer.special_options`."""
        found: dict[str, tuple[Option, ...]] = {}
        for token in self._tokens.values():
            names = [name for name in _OPTIONS if getattr(token, name)]
            if split_special and token.content in self._special:
                names.append("as_text")
            if names:
                found[token.content] = tuple(names)
        return found
