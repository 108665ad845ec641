"""Tokenizers that the library `tokenizers` runs: SentencePiece's BPE and Unigram, WordPiece, and
byte-level BPE that tiktoken would split or merge otherwise.

A text goes through a pipeline (https://huggingface.co/docs/tokenizers/pipeline): added tokens are
looked for, the rest is normalized, split by a pre-tokenizer, and each piece cut into tokens by the
model. `tokenizers` does all this. Tokens become bytes by gptk.text.decoders.
"""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gptk.distribution import install_command
from gptk.errors import TokenizerError
from gptk.text.decoders import TokenDecoder
from gptk.text.ids import check_ids
from gptk.text.nesting import check_repetitions

if TYPE_CHECKING:
    import tokenizers


class PipelineEncoding:
    """The pipeline of a `tokenizers.Tokenizer`, with the methods of a `tiktoken.Encoding` that gptk
    uses.

    name: for messages and records. pipeline: its model, normalizer, pre-tokenizer, decoder, added
    tokens and `encode_special_tokens` are taken; its post-processor, truncation and padding are
    not. It may be changed afterwards, but its model is shared.

    Raises TokenizerError for a model that cuts texts at random, for a decoder by which a token
    alone has no bytes, for patterns with repetitions in repetitions, and for impossible ids.
    """

    def __init__(self, name: str, pipeline: "tokenizers.Tokenizer") -> None:
        self.name = name
        with _library_errors():
            model = pipeline.model
            for option in ("dropout", "alpha", "nbest_size"):
                if value := getattr(model, option, None):
                    raise TokenizerError(f"its model cuts texts at random: {option}={value}")
            components = _components(pipeline)
            for part in components.values():
                check_repetitions(part)
            self._decoder = TokenDecoder(components["decoder"])
            self._settings = components
            self._pipeline = _pipeline(model, components)
            _add(self._pipeline, pipeline.get_added_tokens_decoder())
            self._pipeline.encode_special_tokens = pipeline.encode_special_tokens
            self.max_token_value = check_ids(self.vocabulary().values())
        self._special_tokens = {
            token.content: number
            for number, token in self._pipeline.get_added_tokens_decoder().items()
            if token.special
        }

    @classmethod
    def from_json(
        cls,
        name: str,
        text: str,
        *,
        added: Iterable[Mapping[str, Any]] = (),
        splits_special_tokens: bool = False,
    ) -> "PipelineEncoding":
        """An encoding from the text of a `tokenizer.json`.

        added: the options of further added tokens, as the file would have them. Raises
        TokenizerError if `tokenizers` is not installed, and what is said above.
        """
        with _library_errors():
            pipeline = _library().Tokenizer.from_str(text)
            pipeline.add_tokens([_library().AddedToken(**options) for options in added])
            pipeline.encode_special_tokens = splits_special_tokens
        return cls(name, pipeline)

    def to_json(self) -> str:
        """The text of a `tokenizer.json`. It does not say whether special tokens are split."""
        settings = json.loads(self._pipeline.to_str()) | {"decoder": self._settings["decoder"]}
        return json.dumps(settings, ensure_ascii=False)

    @property
    def splits_special_tokens(self) -> bool:
        """Whether the text of a special token is encoded as ordinary text."""
        return bool(self._pipeline.encode_special_tokens)

    def vocabulary(self) -> dict[str, int]:
        """The tokens as the file spells them, with their ids."""
        found: dict[str, int] = self._pipeline.get_vocab(with_added_tokens=True)
        return found

    @property
    def n_vocab(self) -> int:
        """One more than the highest id."""
        return self.max_token_value + 1

    @property
    def special_tokens_set(self) -> set[str]:
        """The texts of the special tokens."""
        return set(self._special_tokens)

    def encode_single_token(self, text: str) -> int:
        """The id of a special token. Raises KeyError for another text."""
        return self._special_tokens[text]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which added tokens are recognized; without a BOS.

        Lone surrogates become U+FFFD. Raises TokenizerError if the library cannot encode the text,
        for example because the vocabulary lacks a character and has no token for unknown ones.
        """
        return self._ids(self._pipeline, text)

    def encode_within(self, text: str) -> list[int]:
        """Token ids of a text that continues another one: no space is put in front of it."""
        return self._ids(self._within, text)

    def encode_ordinary(self, text: str) -> list[int]:
        """The same with special tokens encoded as ordinary text."""
        return self._ids(self._ordinary, text)

    def _ids(self, pipeline: "tokenizers.Tokenizer", text: str) -> list[int]:
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with _library_errors(f"the tokenizer {self.name}: "):
            ids: list[int] = pipeline.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _within(self) -> "tokenizers.Tokenizer":
        return self._variant(splits_special_tokens=self.splits_special_tokens)

    @functools.cached_property
    def _ordinary(self) -> "tokenizers.Tokenizer":
        return self._variant(splits_special_tokens=True)

    def _variant(self, *, splits_special_tokens: bool) -> "tokenizers.Tokenizer":
        """The pipeline without what puts a space in front of a text; the model is shared."""
        with _library_errors():
            made = _pipeline(self._pipeline.model, _without_prefix(self._settings))
            _add(made, self._pipeline.get_added_tokens_decoder())
            made.encode_special_tokens = splits_special_tokens
        return made

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of a token within a text. Raises KeyError for an id that the vocabulary
        lacks."""
        return self._decoder.inside(self._token(token))

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of a whole text; U+FFFD for an id that the vocabulary lacks.

        They differ from those of its tokens at the beginning, where the decoder may leave out a
        space. Other than in `tokenizers`, bytes that are no UTF-8 are kept.
        """
        parts = []
        for token in tokens:
            try:
                text = self._token(token)
            except KeyError:
                parts.append("\N{REPLACEMENT CHARACTER}".encode())
            else:
                parts.append(self._decoder.inside(text) if parts else self._decoder.first(text))
        return self._decoder.without_beginning(b"".join(parts))

    def _token(self, token: int) -> str:
        """A token as the decoder gets it: added tokens may be normalized."""
        if not 0 <= token <= self.max_token_value or self._pipeline.id_to_token(token) is None:
            raise KeyError(token)
        text: str = self._pipeline.decode([token], skip_special_tokens=False)
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "text": self.to_json(),
            "splits_special_tokens": self.splits_special_tokens,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(self.from_json(**state).__dict__)


def _library() -> Any:
    """The module `tokenizers`. Raises TokenizerError if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError(
            f"this tokenizer needs the package tokenizers: {install_command('tokenizers')}"
        ) from None
    return tokenizers


@contextlib.contextmanager
def _library_errors(where: str = "") -> Iterator[None]:
    """Turns errors of `tokenizers` into a TokenizerError of one line that begins with `where`."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        # The library's panics are no Exceptions; it has no class of its own for errors.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{where}the package tokenizers fails: {reason}") from None


def _components(pipeline: "tokenizers.Tokenizer") -> dict[str, Any]:
    """The settings of a normalizer, pre-tokenizer and decoder, as in a `tokenizer.json`."""
    small = _library().Tokenizer(_library().models.WordLevel({}, ""))
    names = ("normalizer", "pre_tokenizer", "decoder")
    for name in names:
        if (part := getattr(pipeline, name)) is not None:
            setattr(small, name, part)
    settings = json.loads(small.to_str())
    return {name: settings[name] for name in names}


def _pipeline(model: Any, components: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """A pipeline without a decoder, so that its `decode` gives tokens as a decoder gets them."""
    whole = {"version": "1.0", "added_tokens": [], **components, "decoder": None}
    whole["model"] = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    made: tokenizers.Tokenizer = _library().Tokenizer.from_str(json.dumps(whole))
    made.model = model
    return made


def _add(pipeline: "tokenizers.Tokenizer", tokens: Mapping[int, Any]) -> None:
    """Add tokens, by their ids, in the order of these: so they get the same ones again."""
    pipeline.add_tokens([tokens[number] for number in sorted(tokens)])


def _without_prefix(settings: Any) -> Any:
    """The settings without what puts a space, or its stand-in, in front of a text."""
    if isinstance(settings, list):
        return [_without_prefix(part) for part in settings]
    if not isinstance(settings, dict):
        return settings
    match settings.get("type"):
        case "Prepend":
            return {"type": "Sequence", "normalizers": []}
        case "Metaspace":
            return settings | {"prepend_scheme": "never"}
        case "ByteLevel" if settings.get("add_prefix_space"):
            return settings | {"add_prefix_space": False}
    return {name: _without_prefix(value) for name, value in settings.items()}
