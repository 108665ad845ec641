"""The program that renders chat templates, in a process of its own with limits.

A template is untrusted code, and jinja2's sandbox keeps it from Python and from files, but not from
time and memory: a filter such as `center`, a list that contains itself twice, thirty times over, or
a pattern of `format` can take any amount of both. Here the process may take SECONDS of processor
time for a template and BYTES of memory; it ends at more, and `gptk.text.chat` starts another.

It answers each line of JSON on standard input with a line of JSON on standard output:

    {"template": …}                   {} or {"invalid": reason}
    {"template": …, "variables": …}   {"text": …}, {"refused": reason} or {"failed": reason}

This file imports nothing of gptk, so that it starts in a tenth of a second. Its arguments are the
folders in which jinja2 and markupsafe are.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from types import CodeType
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[1:]

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, modifies_known_mutable
from jinja2.utils import Namespace

SECONDS = 3
"""Processor time for a template."""
BYTES = 300_000_000
"""Memory that templates may take, above what the process takes when it starts."""
MAX_STEPS = 200_000
"""Loop iterations and calls."""
MAX_SIZE = 10_000_000
"""Characters of the rendered text; also the items or bits of a result of `*` and `**`."""


def main() -> None:
    """Answer requests until standard input ends."""
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time()
        answer = json.dumps(_answer(json.loads(line)))
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        code, takes_parts = _compiled(request["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"invalid": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"failed": _TOO_MUCH}
    except Exception as error:  # nested too deeply, or another error of the compiler
        return {"invalid": _brief(error)}
    if "variables" not in request:
        return {}
    variables = request["variables"]
    if not takes_parts:
        for message in variables["messages"]:
            if isinstance(message.get("content"), list):
                message["content"] = "\n".join(part["text"] for part in message["content"])
    environment = _Sandbox()
    template = environment.template_class.from_code(
        environment, code, environment.make_globals(None), None
    )
    try:
        return {"text": _joined(template.generate(**variables))}
    except _RefusedError as refusal:
        return {"refused": str(refusal)}
    except MemoryError:
        return {"failed": _TOO_MUCH}
    except Exception as error:  # any other error is the template's fault
        return {"failed": _brief(error)}


_TOO_MUCH = f"it was stopped at {BYTES // 10**6} MB of memory"


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # only Linux has all of this
        pass


def _limit_time() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + SECONDS, hard))
    except (ImportError, OSError, ValueError):  # on Windows the time on the clock is the limit
        pass


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[CodeType, bool]:
    """A template, and whether it takes a message's content as a list of parts."""
    environment = _Sandbox()
    tree = environment.parse(source)
    takes_parts = _takes_parts(tree)
    # Each loop iteration calls `turn`, so that the environment counts it.
    for loop in tree.find_all(nodes.For):
        loop.body.insert(0, nodes.ExprStmt(_turn(), lineno=loop.lineno))
        if loop.test is not None:
            loop.test = nodes.And(_turn(), loop.test)
    tree.set_environment(environment)
    return environment.compile(tree), takes_parts


def _takes_parts(tree: nodes.Template) -> bool:
    """Whether a loop goes over a message's content, or over a variable that holds it."""
    holds = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, holds):
            holds.add(assignment.target.name)
    return any(_is_content(loop.iter, holds) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, holds: Iterable[str]) -> bool:
    match node:
        case nodes.Filter() | nodes.CondExpr():
            inner = [node.node] if isinstance(node, nodes.Filter) else [node.expr1, node.expr2]
            return any(_is_content(part, holds) for part in inner)
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            if isinstance(node.arg, nodes.Slice):
                return _is_content(node.node, holds)
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        case nodes.Name():
            return node.name in holds
    return False


def _joined(pieces: Iterator[str]) -> str:
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size > MAX_SIZE:
            raise SecurityError(f"the text grew beyond {MAX_SIZE:,} characters")
    return "".join(parts)


def _brief(error: BaseException) -> str:
    """An error in one line: the message, and for errors of Python the type."""
    text = " ".join(str(error)[:1000].split())
    if isinstance(error, jinja2.TemplateError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- What a template may use ------------------------------------------------------------------


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: object) -> None:
    raise _RefusedError(" ".join(str(message)[:10_000].split()))


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


if __name__ == "__main__":
    main()
