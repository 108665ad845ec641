"""What the program has of the system: arguments, standard streams; and errors in one line."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from gptk.errors import GptkError, brief
from gptk.system.memory import is_out_of_memory

_OUTPUT = "standard output"


class _Output(io.FileIO):
    """Standard output, whose errors say that they are its."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = _OUTPUT
            raise


def prepare_streams() -> None:
    """Make the standard streams ready for any text. Raises OSError if standard output is closed.

    A character that the locale's encoding lacks is written as an escape, such as \\u2026. Where
    that encoding is ASCII, which is nobody's choice, the streams are UTF-8. Streams that are closed
    are opened to nothing, so that no other file gets their number.
    """
    is_closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if is_closed:
        raise OSError(f"{_OUTPUT} is closed")
    if type(sys.stdout) is io.TextIOWrapper and sys.stdout.fileno() == 1:
        old = sys.stdout
        output = io.BufferedWriter(_Output(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(
            output, old.encoding, old.errors, line_buffering=old.line_buffering
        )
    for stream, errors in (
        (sys.stdin, "strict"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = stream.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968")
            encoding = "utf-8" if is_ascii else stream.encoding
            stream.reconfigure(encoding=encoding, errors=errors)


def text_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments as the text that was typed, in a locale whose encoding is not UTF-8, too.

    Names of existing files stay as the system gives them.
    """
    return [argument if os.path.exists(argument) else _as_utf8(argument) for argument in arguments]


def _as_utf8(argument: str) -> str:
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def is_text(text: str) -> bool:
    """Whether a text is made of characters, and not of bytes that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def explain(error: Exception) -> tuple[str, int]:
    """What to tell of an error that ended the program, in one line, and the exit code."""
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, GptkError):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return f"{_NO_MEMORY} ({brief(error)})", 1
    if isinstance(error, OSError):
        return _of_system(error), 1
    if isinstance(error, UnicodeEncodeError):
        return (
            f"{error.object[:80]!r} cannot be written in the encoding {error.encoding}; set "
            "PYTHONUTF8=1, or choose another name",
            1,
        )
    return (
        f"internal error: {brief(error)} (this is a fault in gptk; `gptk --debug …` shows where, "
        "please report it)",
        1,
    )


def discard_output() -> None:
    """Discard what is still to be written to standard output, which cannot be written.

    The interpreter would complain of it at its end.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: no file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _of_system(error: OSError) -> str:
    """An error of the system in words: which file, or standard output, and why."""
    reason = error.strerror or str(error)
    if error.filename == _OUTPUT:
        discard_output()
        return f"{_OUTPUT} cannot be written: {reason}"
    return reason if error.filename is None else f"{error.filename}: {reason}"


_NO_MEMORY = (
    "there is not enough memory; take a smaller model or --quantize int8, or ask for fewer results "
    "and prompts at a time"
)
