"""Constrained decoding (Willard and Louf 2023): only tokens that can continue a valid text.

    logit'(v) = logit(v) if some valid text begins with text + bytes(v), else -inf
    EOS is allowed iff text itself is valid

text is the row's text after its prompt. A Lark grammar defines which texts are valid; llguidance
(https://github.com/guidance-ai/llguidance) masks the vocabulary, a trie, by it in 0.02 to 0.5 ms.
Where the grammar determines the next characters, as between the keys of a JSON object, only the
token that the tokenizer itself would choose is allowed: models have seen few texts with unusual
token boundaries, and SmolLM2 continues those worse (`{"`, `n`, `ame` than `{"`, `name`).

llguidance's end token has the first id after the vocabulary. Its bit in a mask says that the text
is valid as it stands; the ids that end a row may differ from call to call.
"""

import contextlib
import functools
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

import gptk
from gptk_plugins.constraints import _trial

if TYPE_CHECKING:
    import tiktoken
    from llguidance import LLMatcher

T = TypeVar("T")
_Encoding: TypeAlias = "tiktoken.Encoding | gptk.PipelineEncoding"


class Constraint(gptk.LogitsProcessor):
    """The base class of constraints, each of which gives the valid texts as a Lark grammar."""

    shows_positions: ClassVar[bool] = False
    """Whether messages have a line and column of the grammar: if it is the user's own."""

    def grammar_text(self) -> str:
        """The grammar. Raises ValueError if the options are wrong."""
        raise NotImplementedError(f"{type(self).__name__} does not define grammar_text()")

    def subject(self) -> str:
        """What error messages name as the cause if the grammar cannot be used."""
        raise NotImplementedError(f"{type(self).__name__} does not define subject()")

    def model_post_init(self, context: Any, /) -> None:
        self._grammar  # noqa: B018 - so that errors show here, not at the first prompt

    def is_plain(self, grammar: str) -> bool:
        """Whether llguidance is certain to compile it in little time, memory and stack."""
        return len(grammar) <= 20_000

    def files_read(self) -> Sequence[gptk.plugins.ReadFile]:
        return self._files

    @functools.cached_property
    def _files(self) -> list[gptk.plugins.ReadFile]:
        """The files that `_read` has read."""
        return []

    def _read(self, option: str, *, literal: bool, form: str) -> str:
        """The text of an option if it is literal, else that of the file which it names.

        form: what a literal text would be, for the message. Raises ValueError.
        """
        if literal:
            return option
        text = _text_of(option, form)
        self._files.append(gptk.plugins.ReadFile.of(option))
        return text

    @functools.cached_property
    def _grammar(self) -> "_Grammar":
        with self._option_errors():
            text = self.grammar_text()
            grammar = _Grammar(text, is_plain=self.is_plain(text))
            check(grammar, positions=self.shows_positions)
        return grammar

    def start(self, rows: gptk.Rows) -> "RowMatchers":
        """A follower with a matcher for each row.

        Raises TokenizerError without a tokenizer, OptionError if its tokens form no valid text.
        """
        return RowMatchers(self._begin(rows), rows)

    def is_complete(self, tokens: Sequence[int], rows: gptk.Rows) -> bool:
        """Whether the tokens' text is valid as it stands."""
        state = self._begin(rows)
        state.extend(tokens)
        return state.may_end()

    def _begin(self, rows: gptk.Rows) -> "_RowState":
        if rows.tokenizer is None:
            raise gptk.TokenizerError(
                f"{self.title()} needs the text of tokens, and the model comes without a "
                "tokenizer; name one, such as --tokenizer gpt2"
            )
        vocabulary = _vocabulary(rows.tokenizer)
        with self._option_errors():
            return _RowState(vocabulary, vocabulary.matcher(self._grammar), frozenset(rows.eos))

    @contextlib.contextmanager
    def _option_errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError:
            raise gptk.OptionError(
                f"{self.title()}: {self.subject()}: has characters that no text can have"
            ) from None
        except ValueError as error:
            raise gptk.OptionError(f"{self.title()}: {self.subject()}: {error}") from None


class _Grammar(NamedTuple):
    """A grammar, and whether it may be compiled without a trial."""

    text: str
    is_plain: bool

    def on_stack(self, compute: Callable[[], T]) -> T:
        """Calls a function that compiles the grammar where the stack suffices."""
        if self.is_plain:
            return compute()
        return _trial.on_stack(2 * _trial.STACK_MEGABYTES, compute)


class RowMatchers:
    """A matcher for each row; called, it masks the tokens that may not come next.

    Once a row has ended, or got a token that is not allowed, all tokens are masked until a rewind.
    If no ids end a row (EOS is ignored), all tokens are also masked once the text is valid and
    nothing can follow.
    """

    def __init__(self, state: "_RowState", rows: gptk.Rows) -> None:
        self._end = len(state.vocabulary.tokens)
        self._eos = rows.eos
        self._special = state.vocabulary.special
        self._states = [state, *(state.copy() for _ in range(1, len(rows)))]

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        bits = np.zeros((len(self._states), self._end // 32 + 1), dtype=np.int32)
        for row, state in enumerate(self._states):
            if not state.outside:
                state.write_mask(bits[row])
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
        may_end = allowed[:, self._end].copy()
        allowed[:, self._end :] = 0
        width = logits.shape[-1]
        if width > allowed.shape[1]:  # a model's vocabulary may be padded to a round size
            allowed = np.pad(allowed, ((0, 0), (0, width - allowed.shape[1])))
        for token in self._eos:
            if token < width:
                if token not in self._special:
                    allowed[:, token] = 0  # it ends the row, even if it has a text
                allowed[:, token] |= may_end
        mask = torch.from_numpy(allowed[:, :width].view(np.bool_)).to(logits.device)
        return torch.where(mask, logits, -torch.inf)  # masked_fill(~mask) takes 1.5 times as long

    def extend(self, tokens: Tensor) -> None:
        for state, new in zip(self._states, tokens.tolist(), strict=True):
            state.extend(new)

    def select(self, parents: Sequence[int]) -> None:
        moved: set[int] = set()
        states = []
        for parent in parents:
            state = self._states[parent]
            states.append(state.copy() if parent in moved else state)
            moved.add(parent)
        self._states = states

    def rewind(self, counts: Sequence[int]) -> None:
        for state, count in zip(self._states, counts, strict=True):
            state.rewind(count)


class _RowState:
    """The matcher of a row, and how many tokens it has not consumed."""

    __slots__ = ("_eos", "matcher", "outside", "vocabulary")

    def __init__(
        self,
        vocabulary: "_Vocabulary",
        matcher: "LLMatcher",
        eos: frozenset[int],
        outside: int = 0,
    ) -> None:
        self.vocabulary = vocabulary
        self.matcher = matcher
        self.outside = outside
        """Tokens that the matcher did not consume: EOS or one not allowed, and all after it."""
        self._eos = eos

    def copy(self) -> "_RowState":
        return _RowState(self.vocabulary, self.matcher.deep_copy(), self._eos, self.outside)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.outside or token in self._eos or not self._consumes(token):
                self.outside += 1

    def rewind(self, count: int) -> None:
        inside = max(0, count - self.outside)
        self.outside -= count - inside
        if inside:
            self.matcher.rollback(inside)
            _check(self.matcher)

    def may_end(self) -> bool:
        """Whether the text is valid, or the grammar itself has an EOS token as the next one."""
        special_eos = self._eos & self.vocabulary.special
        return not self.outside and (
            self.matcher.is_accepting()
            or any(self.matcher.validate_tokens([token]) for token in special_eos)
        )

    def write_mask(self, bits: "np.ndarray[Any, np.dtype[np.int32]]") -> None:
        """Set the bits of the tokens that may come next."""
        # On a copy (3 µs), because a matcher that finds no allowed token cannot be rolled back.
        matcher = self.matcher.deep_copy()
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():
            _check(matcher)
            bits[:] = 0

    def _consumes(self, token: int) -> bool:
        # A matcher fails on a token without text or beyond its vocabulary.
        if not self.vocabulary.has_text(token):
            return False
        consumed = self.matcher.try_consume_tokens([token])
        _check(self.matcher)
        return bool(consumed)


_NO_TOKEN_FITS = "NoExtensionBias"  # llguidance's name for it


def _check(matcher: "LLMatcher") -> None:
    """Raise DecodingError if a matcher has failed, as when a limit of llguidance is exceeded."""
    error = matcher.get_error()
    if error and not error.startswith(_NO_TOKEN_FITS):
        raise gptk.DecodingError(f"llguidance cannot follow the constraint: {explain(error)}")


class _Vocabulary:
    """A tokenizer in the form that llguidance needs, with a cache of matchers."""

    def __init__(self, tokenizer: gptk.Tokenizer) -> None:
        encoding = tokenizer.encoding
        self.tokens = [_bytes_of(encoding, token) for token in range(encoding.max_token_value + 1)]
        self.special = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
        self._tokenizer = llguidance().LLTokenizer(_Wrapper(self, encoding))
        known = set(self.tokens)
        self._absent = {byte for byte in range(256) if bytes([byte]) not in known}
        # Copies share their lexer's cache, so that a second call starts fast.
        self._cached_new = functools.lru_cache(maxsize=16)(self._new)

    def has_text(self, token: int) -> bool:
        return token < len(self.tokens) and bool(self.tokens[token])

    def matcher(self, grammar: _Grammar) -> "LLMatcher":
        """A matcher before its first token. Raises ValueError if no text is valid."""
        return self._cached_new(grammar).deep_copy()

    def _new(self, grammar: _Grammar) -> "LLMatcher":
        # The tokenizer drops bytes that its vocabulary lacks (SmolLM2's: six control characters and
        # a few others), so text with these bytes must not be forced to the tokenizer's own tokens.
        text = grammar.text
        escaped = re.search(r"\\[xuU]", text) is not None
        if self._absent and (escaped or not self._absent.isdisjoint(text.encode())):
            text += '\n%llguidance {"no_forcing": true}\n'
        matcher: LLMatcher
        matcher, problem = grammar.on_stack(
            lambda: _trial.first_matcher(llguidance(), self._tokenizer, text)
        )
        if problem:
            raise ValueError(explain(problem))
        return matcher


class _Wrapper:
    """The attributes of a tokenizer that LLTokenizer reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: _Vocabulary, encoding: _Encoding) -> None:
        self.tokens = [*vocabulary.tokens, b"<end>"]
        self.eos_token_id = len(vocabulary.tokens)
        self.special_token_ids = [*vocabulary.special, self.eos_token_id]  # these are never text
        self._encoding = encoding

        self._longest = max(map(len, vocabulary.tokens), default=0)
        self._ids: dict[bytes, int] = {}

    def __call__(self, text: str) -> list[int]:
        ids = self._encoding.encode_ordinary(text)
        data = text.encode()
        if b"".join(self.tokens[token] for token in ids) == data:
            return ids
        return self._greedily(data)  # a normalizer has changed the text

    def _greedily(self, data: bytes) -> list[int]:
        """Always the longest token that the bytes begin with; up to where none does."""
        if not self._ids:
            special = set(self.special_token_ids)
            self._ids = {t: i for i, t in enumerate(self.tokens) if t and i not in special}
        ids: list[int] = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            size = next((size for size in sizes if data[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids


def _bytes_of(encoding: _Encoding, token: int) -> bytes:
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:  # an id that the vocabulary lacks
        return b""


_vocabularies: "weakref.WeakKeyDictionary[gptk.Tokenizer, _Vocabulary]"
_vocabularies = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: gptk.Tokenizer) -> _Vocabulary:
    """The vocabulary of a tokenizer, cached: making it takes 0.15 s for 50,000 tokens."""
    if tokenizer not in _vocabularies:
        _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return _vocabularies[tokenizer]


def llguidance() -> Any:
    """The module. Raises PluginError if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise gptk.PluginError(
            "constraints need the package llguidance: pip install 'gptk-decoding[constraints]'"
        ) from None
    return llguidance


def check(grammar: _Grammar, *, positions: bool) -> None:
    """Raise ValueError for errors of a grammar that can be found without the vocabulary.

    positions: whether the message has line and column.
    """
    grammar.text.encode()  # a lone surrogate raises UnicodeEncodeError here, another error below
    # A special token is one that the byte tokenizer lacks.
    reader = "validate" if re.search(r"<\S+>", grammar.text) else "check"
    if grammar.is_plain:
        problem = _trial.problem(llguidance(), grammar.text, reader)
    else:
        llguidance()  # for the message if it is not installed
        problem = _trial.problem_in_child(grammar.text, reader)
    if problem:
        raise ValueError(explain(problem, positions=positions))


def explain(error: str, *, positions: bool = False) -> str:
    """A message of llguidance in one line, without its excerpts from the grammar."""
    if error.startswith(_NO_TOKEN_FITS):
        return "no text fits"
    if error.startswith("rollback not supported"):
        return "max_tokens and stop of a rule are not supported; suffix and lazy are"
    if error.startswith("panic: "):
        return "llguidance failed on it, probably since it is too large"
    position = re.match(r"(?:at )?(\d+)\((\d+)\): ", error)
    text = error[position.end() :] if position else error
    found = re.search(r"^error: (.*)", text, re.MULTILINE)
    reason = found[1] if found else text.partition("\n")[0]
    if reason == "lexer error":
        reason = "no part of a grammar; in texts, control characters are written \\n, \\u007f"
    reason = re.sub(r'^(invalid regex ".*" \(in regex\)|failed to compile .*?): ', "", reason)
    if position and positions:
        return f"line {position[1]}, column {position[2]}: {reason}"
    return reason


def _text_of(option: str, form: str) -> str:
    """The text of the file that an option names. Raises ValueError."""
    if not os.path.exists(option):
        raise ValueError(f"there is no such file, and it is not {form}")
    if not os.path.isfile(option) and not os.path.isdir(option):
        raise ValueError("is not a regular file")
    try:
        return Path(option).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError("is not a text in UTF-8") from None
