"""Chat: the prompt for a conversation, rendered with the model's chat template.

A chat model was trained on conversations in an exact format, and its files include a jinja2
template that writes it. It is rendered like `apply_chat_template` of transformers: line breaks and
indentation around blocks are removed (trim_blocks, lstrip_blocks), `break` and `continue` work in
loops, `tojson` does not escape HTML, `{% generation %}` may enclose the model's replies, and the
variables and functions of a template are

    messages, add_generation_prompt, tools and documents (None),
    bos_token, eos_token, pad_token and the model's other named tokens,
    raise_exception(message), strftime_now(format)

A template is untrusted code. It runs in a process of its own, see gptk.text.rendering, in jinja2's
immutable sandbox: no access to Python's internals, to files, or to what it gets, and no more than 3
seconds, 300 MB, 200,000 loop iterations and calls, and 10 million characters.
"""

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptk.errors import PromptError
from gptk.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""{"role": "user", "content": "…"}; the template defines the roles: system, user, assistant. The
content is a text, or a list of parts: {"type": "text", "text": "…"}."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None
) -> list[int]:
    """The tokens of a conversation, up to where the model's reply begins.

    As in transformers, only the template adds BOS, and special tokens are recognized everywhere,
    also within the messages. Raises PromptError, see `render_chat`.
    """
    return tokenizer.encode_without_bos(render_chat(tokenizer, messages, template))


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation. template: jinja2, instead of the tokenizer's own.

    add_generation_prompt: end with the text that opens the model's reply. A content that is a list
    of parts is given to templates that go over it in a loop; for others its texts are joined by
    line breaks.

    Raises PromptError if there is no template, if it refuses the messages (for example for the
    order of roles), if it fails or takes too long, or if a part is no text.
    """
    source = tokenizer.chat_template if template is None else template
    if not source:
        raise PromptError(
            "the model has no chat template; give one (--chat-template FILE, in Python "
            "template=…), or a plain prompt without chat"
        )
    variables = {
        "messages": _checked(messages),
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **_special_tokens(tokenizer),
    }
    answer = _ask(source, variables)
    if "refused" in answer:
        raise PromptError(f"the chat template refuses the messages: {answer['refused']}")
    return answer["text"]


def check_template(source: str) -> None:
    """Raise PromptError if a template is not valid jinja2."""
    _ask(source, None)


def conversation(message: str, system: str | None = None) -> list[Message]:
    """The messages of a conversation that begins with a user message."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": message}]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    if tokenizer.template_tokens is not None:
        return dict(tokenizer.template_tokens)
    ids = {"bos_token": tokenizer.bos, "eos_token": next(iter(tokenizer.eos), None)}
    return {name: tokenizer.decode([token]) for name, token in ids.items() if token is not None}


# --- Messages ---------------------------------------------------------------------------------

_FORM = '{"role": "user", "content": "…"}'


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages as plain types; as in transformers, a key without a value is left out."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"chat takes a list of messages, {_FORM}; not {_shown(messages)}")
    if not messages:
        raise PromptError(f"the conversation has no messages; one is {_FORM}")
    plain = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not (
            "role" in message and message.keys() & {"content", "tool_calls"}
        ):
            raise PromptError(f"message {number} is not like {_FORM}: {_shown(message)}")
        if not isinstance(message["role"], str):
            raise PromptError(f"message {number} has the role {_shown(message['role'])}, no text")
        if isinstance(message.get("content"), list | tuple):
            _check_parts(message["content"], number)
        try:
            found = _plain(message, number)
        except RecursionError:
            raise PromptError(f"message {number} is nested too deeply") from None
        plain.append({key: value for key, value in found.items() if value is not None})
    return plain


def _check_parts(parts: Sequence[Any], number: int) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of the type {_shown(kind)}" if kind else f"the part {_shown(part)}"
            raise PromptError(
                f"message {number} has {what}; gptk's models read text only: a content is a text, "
                'or a list of parts {"type": "text", "text": "…"}'
            )


def _plain(value: Any, number: int) -> Any:
    if value is None or type(value) in (str, float, bool):
        return value
    if type(value) is int and value.bit_length() < 10_000:
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
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # nested too deeply, or a number with too many digits
        return f"a {type(value).__name__}"


# --- The process that renders -----------------------------------------------------------------

WALL_SECONDS = 10
"""Time on the clock for a template, where its processor time cannot be limited or is short."""


def _ask(template: str, variables: dict[str, Any] | None) -> dict[str, str]:
    """Render a template, or only compile it if `variables` is None. Raises PromptError."""
    request: dict[str, Any] = {"template": template}
    if variables is not None:
        request["variables"] = variables
    try:
        line = json.dumps(request).encode()
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise PromptError(f"the messages cannot be given to the template: {error}") from None
    answer = _renderer.ask(line)
    if "invalid" in answer:
        raise PromptError(f"the chat template is not valid jinja2: {answer['invalid']}")
    if "failed" in answer:
        raise PromptError(f"the chat template fails: {answer['failed']}")
    return answer


class _Renderer:
    """The process of gptk.text.rendering: started when it is first needed, and after a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> dict[str, str]:
        """The answer to a request."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(WALL_SECONDS, process.kill)
            timer.daemon = True
            timer.start()
            try:
                process.stdin.write(line + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # Ctrl-C: its answer would be taken for that of the next request
                self.close()
                raise
            finally:
                timer.cancel()
            if answer.endswith(b"\n"):
                decoded: dict[str, str] = json.loads(answer)
                return decoded
            self.close()
        return {"failed": "it was stopped, for it took too much time or memory"}

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            folders = [
                str(Path(spec.origin).parent.parent)
                for spec in map(importlib.util.find_spec, ("jinja2", "markupsafe"))
                if spec is not None and spec.origin is not None
            ]
            program = Path(__file__).with_name("rendering.py")
            try:
                self._process = subprocess.Popen(
                    # Neither the environment nor other packages have a say in what it imports.
                    [sys.executable, "-I", "-S", str(program), *folders],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is not for it
                )
            except OSError as error:
                raise PromptError(
                    f"chat templates are rendered in a process of their own, and {sys.executable} "
                    f"cannot be started: {error.strerror}"
                ) from None
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def forget(self) -> None:
        """In a forked process: leave the process to the one that started it."""
        self._lock, self._process = threading.Lock(), None


_renderer = _Renderer()
atexit.register(_renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)
