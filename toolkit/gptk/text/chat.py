"""Chat: the prompt for a conversation, rendered with the model's chat template.

A chat model was trained on conversations in an exact format, and its files include a jinja2
template that writes it. It is rendered like `apply_chat_template` of transformers: line breaks and
indentation around blocks are removed (trim_blocks, lstrip_blocks), `break` and `continue` work in
loops, `tojson` does not escape HTML, `{% generation %}` may enclose the model's replies, and the
variables and functions of a template are

    messages, add_generation_prompt, bos_token, eos_token, tools and documents (None),
    raise_exception(message), strftime_now(format)

A template is untrusted code. It runs in jinja2's immutable sandbox: no access to Python's internals
by attributes, no files, no change to its arguments, no range of over 100,000. It is stopped after
MAX_STEPS loop iterations and calls, or MAX_SIZE characters.
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
"""{"role": "user", "content": "…"}; the template defines the roles: system, user, assistant."""

MAX_STEPS = 200_000
"""Loop iterations and calls: about a second."""
MAX_SIZE = 10_000_000
"""Characters of the rendered text; also the items or bits of a result of `*` and `**`."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None
) -> list[int]:
    """The tokens of a conversation, up to where the model's reply begins.

    As in transformers, only the template adds BOS, and special tokens are recognized everywhere,
    also within the messages. Raises PromptError, see `render_chat`.
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

    add_generation_prompt: end with the text that opens the model's reply. Raises PromptError if
    there is no template, if it refuses the messages (for example for the order of roles), or if it
    fails.
    """
    source = tokenizer.chat_template if template is None else template
    if not source:
        raise PromptError(
            "the model has no chat template; give one (--chat-template FILE, in Python "
            "template=…), or a plain prompt without chat"
        )
    plain_messages = _checked(messages)
    code = check_template(source)
    environment = _Sandbox()
    compiled = environment.template_class.from_code(
        environment, code, environment.make_globals(None), None
    )
    try:
        pieces = compiled.generate(
            messages=plain_messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **_special_tokens(tokenizer),
        )
        return _joined(pieces)
    except _RefusedError as refusal:
        raise PromptError(f"the chat template refuses the messages: {refusal}") from None
    except Exception as error:  # any other error is the template's fault
        raise PromptError(f"the chat template fails: {_brief(error)}") from None


@functools.lru_cache(maxsize=16)
def check_template(source: str) -> CodeType:
    """A template, compiled. Raises PromptError if it is not valid jinja2."""
    environment = _Sandbox()
    try:
        tree = environment.parse(source)
        # Each loop iteration calls `turn`, so that the environment counts it.
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_turn(), lineno=loop.lineno))
            if loop.test is not None:
                loop.test = nodes.And(_turn(), loop.test)
        tree.set_environment(environment)
        return environment.compile(tree)
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except Exception as error:  # nested too deeply, or another error of the compiler
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
    """The messages of a conversation that begins with a user message."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": message}]


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages as plain types, so that a template can call no other methods."""
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
        return {str.__str__(key): _plain(item, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, number) for item in value]
    raise PromptError(
        f"message {number} holds {_shown(value)}; allowed are texts, numbers, lists and dicts"
    )


def _shown(value: object) -> str:
    return f"{value!r:.80}"


def _brief(error: BaseException) -> str:
    """An error in one line: the message, and for errors of Python the type."""
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
    """Replaces the class `dict` in templates: it makes dicts, without access to the class."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja2's namespace, without names that begin with an underscore."""

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
    """`{% generation %}…{% endgeneration %}`: marks the model's replies for training. A scope."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox for a single rendering, which also limits steps and the size of results."""

    # Without interception, `2 ** 10 ** 10` would be computed during compilation.
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
        """Called at each loop iteration, through `call`."""
        return True

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > MAX_SIZE:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # jinja2 raises an error only when the attribute is used, and renders it as an empty text.
        if modifies_known_mutable(obj, attribute):
            return super().unsafe_undefined(obj, attribute)
        raise SecurityError(
            f"access to the attribute {attribute!r} of a {type(obj).__name__} is not allowed"
        )


def _turn() -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)


def _size(operator: str, left: Any, right: Any) -> int:
    """The approximate size of a product or power: items of a sequence, bits of an integer."""
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            return left.bit_length() + right.bit_length()
        return left.bit_length() * max(right, 0)
    for sequence, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times
    return 0
