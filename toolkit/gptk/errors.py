"""gptk's errors. A message says what was given, what is allowed, and what to do.

It is one line of text. The CLI prints it and exits 1, or 2 where the command line is at fault.
"""

import difflib
import reprlib
import sys
from collections.abc import Iterable


class GptkError(Exception):
    """The base of every error gptk raises on purpose.

    Its message is one line: line breaks become spaces, and characters that cannot be printed
    (in the names of files and tensors, for example) are escaped.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class OptionError(GptkError):
    """An option is unknown, of the wrong type, or out of bounds."""

    exit_code = 2


class UnknownNameError(GptkError):
    """No plug-in of that kind has that name."""

    exit_code = 2


class SpecError(GptkError):
    """A spec string does not have the form `name:key=value,key=value`."""

    exit_code = 2


class PluginError(GptkError):
    """A plug-in breaks a rule of the plug-in system, such as a name that is already taken."""


class InternalError(GptkError):
    """Code of gptk's own fails, a built-in plug-in's included: a fault to be reported to gptk."""


class SourceError(GptkError):
    """A model source is missing, truncated, or of an unsupported kind."""


class TokenizerError(GptkError):
    """A tokenizer is missing, corrupt, or of an unsupported kind."""


class PromptError(GptkError):
    """A prompt is empty, too long for the model's window, or names tokens the model lacks."""


class DeviceError(GptkError):
    """The device does not exist, or does not support what was asked."""

    exit_code = 2


class DecodingError(GptkError):
    """Decoding cannot go on, for example when processors left no token to choose from."""


class IncompatibleError(GptkError):
    """Two strategies do not combine; the message says why."""

    exit_code = 2


class DataError(GptkError):
    """A text to train on or to evaluate on is missing, not UTF-8, or too short."""


class OutOfMemory(GptkError):  # noqa: N818 - torch.OutOfMemoryError is another error
    """The memory of this machine, or what the process may use of it, does not suffice."""


class TrainingError(GptkError):
    """Training cannot go on: a loss that is not finite, a checkpoint that does not fit."""


def suggest(name: str, known: Iterable[str], *, what: str) -> str:
    """The sentence that follows an unknown name: the nearest names, if any, then all names.

    >>> suggest("bean", ["beam", "greedy"], what="samplers")
    'did you mean beam? samplers: beam, greedy'
    >>> suggest("xyz", ["beam", "greedy"], what="samplers")
    'samplers: beam, greedy'
    >>> suggest("xyz", [], what="samplers")
    'no samplers are known'
    """
    names = sorted(known)
    if not names:
        return f"no {what} are known"
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}{what}: {', '.join(names)}"


def shown(value: object, most: int = 60) -> str:
    """A value in a message: its repr, cut short where it is long or nested.

    most: the characters that a text, or any other single value, may have.

    >>> shown("a, b"), shown("x" * 300, most=9), shown([[[[1]]]]), shown(10**5000)
    ("'a, b'", "'xx...xx'", '[[[[...]]]]', 'a number of more than 4300 digits')
    """
    short = reprlib.Repr()
    short.maxlevel = 4
    short.maxstring = short.maxother = most
    short.maxlong = 60
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # of repr, for a large int
        return f"a number of more than {sys.get_int_max_str_digits()} digits"


def counted(count: int, noun: str) -> str:
    """`1 token`, `2 tokens`, `1,000 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def one_line(text: str) -> str:
    """The text in one line, without characters that cannot be printed.

    >>> one_line("a file\\nb\\x1b[0m\\udcff")
    'a file b\\\\x1b[0m\\\\udcff'
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable()
        else " "
        if character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def brief(error: BaseException) -> str:
    """An error in one line: its message, after its type unless gptk raised it on purpose."""
    try:
        said = str(error)
    except Exception:  # it is somebody's own class
        said = ""
    text = said if isinstance(error, GptkError) else ""
    text = text or f"{type(error).__name__}: {said}"
    return text.splitlines()[0].removesuffix(": ")
