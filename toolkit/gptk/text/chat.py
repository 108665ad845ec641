"""Chat: the prompt that a model's own template makes of a conversation.

A chat model was trained on conversations written in one exact form, and its files carry a jinja2
template that writes it. It is rendered as `apply_chat_template` of transformers does it: blocks
take their line breaks and indentation with them (trim_blocks, lstrip_blocks), `break` and
`continue` work in loops, `tojson` escapes no HTML, `{% generation %}` may enclose what the model
says, and a template sees

    messages, add_generation_prompt, bos_token, eos_token, tools and documents (none),
    raise_exception(message), strftime_now(format)

A template is a program that came with somebody's file. It runs in jinja2's immutable sandbox:
no attribute that leads into Python, no files, no change to what it was given, no range of over
100,000. After MAX_STEPS turns of loops and calls, or MAX_SIZE characters, it is stopped.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, modifies_known_mutable
from jinja2.utils import Namespace

from gptk.errors import PromptError
from gptk.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""{"role": "user", "content": "…"}; roles are what the template knows: system, user, assistant."""

MAX_STEPS = 200_000
"""Turns of loops and calls: a second or so."""
MAX_SIZE = 10_000_000
"""Characters of the whole; also the items or bits of what `*` and `**` may make."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None
) -> list[int]:
    """The tokens of a conversation, up to where the model's reply begins.

    Only the template says whether BOS comes first, as in transformers. Special tokens count as
    such wherever they stand, in the messages too. Raises PromptError, see `render_chat`.
    """
    text = render_chat(tokenizer, messages, template)
    return replace(tokenizer, add_bos=False).encode(text)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation. template: jinja2, instead of the tokenizer's own.

    add_generation_prompt: end with what opens the model's reply. Raises PromptError if there is
    no template, if it does not take the messages (roles in another order, for example), or if
    it fails.
    """
    source = tokenizer.chat_template if template is None else template
    if not source:
        raise PromptError(
            "the model has no chat template; give one (--chat-template FILE, in Python "
            "template=…), or a plain prompt without chat"
        )
    given = _checked(messages)
    code = check_template(source)
    environment = _Sandbox()
    made = environment.template_class.from_code(
        environment, code, environment.make_globals(None), None
    )
    try:
        pieces = made.generate(
            messages=given,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **_special_tokens(tokenizer),
        )
        return _joined(pieces)
    except _RefusedError as refusal:
        raise PromptError(f"the chat template refuses the messages: {refusal}") from None
    except Exception as error:  # whatever Python raises, the template is at fault
        raise PromptError(f"the chat template fails: {_brief(error)}") from None


@functools.lru_cache(maxsize=16)
def check_template(source: str) -> CodeType:
    """A template's code. Raises PromptError if it is not valid jinja2."""
    environment = _Sandbox()
    try:
        tree = environment.parse(source)
        # Each turn of a loop is a call, which the environment counts.
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_turn(), lineno=loop.lineno))
            if loop.test is not None:
                loop.test = nodes.And(_turn(), loop.test)
        tree.set_environment(environment)
        return environment.compile(tree)
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except Exception as error:  # too deep, or what the compiler itself cannot do
        reason = _brief(error)
    raise PromptError(f"the chat template is not valid jinja2: {reason}")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    if tokenizer.template_tokens is not None:
        return dict(tokenizer.template_tokens)
    ids = {"bos_token": tokenizer.bos, "eos_token": next(iter(tokenizer.eos), None)}
    return {name: tokenizer.decode([token]) for name, token in ids.items() if token is not None}


def _joined(pieces: Iterator[str]) -> str:
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size > MAX_SIZE:
            raise SecurityError(f"the text grew beyond {MAX_SIZE:,} characters")
    return "".join(parts)


def conversation(message: str, system: str | None = None) -> list[Message]:
    """What one user message begins."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": message}]


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages as plain copies: a template gets no object with methods of its own."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"chat takes a list of messages, {_FORM}; not {_shown(messages)}")
    if not messages:
        raise PromptError(f"the conversation has no messages; one is {_FORM}")
    plain = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not message.keys() >= {"role", "content"}:
            raise PromptError(f"message {number} is not like {_FORM}: {_shown(message)}")
        if not isinstance(message["role"], str):
            raise PromptError(f"message {number} has the role {_shown(message['role'])}, no text")
        plain.append(_plain(message, number))
    return plain


_FORM = '{"role": "user", "content": "…"}'


def _plain(value: Any, number: int) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): _plain(one, number) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, number) for one in value]
    raise PromptError(
        f"message {number} holds {_shown(value)}; allowed are texts, numbers, lists and dicts"
    )


def _shown(value: object) -> str:
    return f"{value!r:.80}"


def _brief(error: BaseException) -> str:
    """An error of jinja2's by its message, one of Python's with its name."""
    text = " ".join(str(error).split())
    if isinstance(error, jinja2.TemplateError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- What a template may use ------------------------------------------------------------------


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: object) -> None:
    raise _RefusedError(" ".join(str(message).split()))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """In place of the class `dict`: what templates make with it, and no way into the class."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja2's, without names that Python would take for its own."""

    def __init__(*args: Any, **items: Any) -> None:  # `self` may be the name of an item
        self, *rest = args
        held = dict(*rest, **items)
        for name in held:
            _check_name(name)
        Namespace.__init__(self, held)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with _, such as {name!r}")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks the model's words for training; a scope."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox for one rendering, which also counts turns and measures products."""

    # `2 ** 10 ** 10` would be computed while compiling if it were not intercepted.
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._steps = 0

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it was stopped after {MAX_STEPS:,} steps")
        return super().call(context, obj, *args, **kwargs)

    def turn(self) -> bool:
        """Called at each turn of a loop, by `call`."""
        return True

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > MAX_SIZE:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # jinja2 raises this only when the attribute is used, and prints it as nothing.
        if modifies_known_mutable(obj, attribute):
            return super().unsafe_undefined(obj, attribute)
        raise SecurityError(
            f"access to the attribute {attribute!r} of a {type(obj).__name__} is not allowed"
        )


def _turn() -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)


def _size(operator: str, left: Any, right: Any) -> int:
    """About how large a product or power is: items of a sequence, bits of a whole number."""
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            return left.bit_length() + right.bit_length()
        return left.bit_length() * max(right, 0)
    for sequence, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times
    return 0
