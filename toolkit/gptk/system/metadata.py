"""Reading the files that describe a model, which anybody may have written.

Only regular files are opened, JSON is read strictly, and fields have types. What is wrong with a
file is one line, in an error of the caller's choice.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from io import BufferedReader
from typing import Any, Self

import pydantic

from gptk.errors import GptkError, SourceError, shown
from gptk.options import from_json
from gptk.system.memory import is_out_of_memory

ErrorType = Callable[[str], GptkError]
"""Makes an error from its message, as the classes in gptk.errors do."""

MAX_BYTES = 1 << 24
"""The size that files of JSON may have unless a caller allows more: read, JSON takes up to thirty
times its size."""
MAX_DEPTH = 100
"""How deeply lists and objects may be nested in JSON."""


def open_regular(path: str | os.PathLike[str], error: ErrorType = SourceError) -> BufferedReader:
    """Open a file for reading, which must be a regular file or a link to one.

    Opening a FIFO would wait for somebody to write to it; reading a device may never end. Raises
    `error` if there is no such file, or it cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        # Asked before opening, too: opening a device can already have an effect.
        _check_regular(os.stat(path), path, error)
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path}: there is no such file") from None
    except (OSError, ValueError) as problem:  # ValueError: a path with a null character
        raise _unreadable(path, problem, error) from None
    file = os.fdopen(descriptor, "rb")
    try:
        _check_regular(os.fstat(descriptor), path, error)
    except BaseException:
        file.close()
        raise
    return file


def read_text(
    path: str | os.PathLike[str], error: ErrorType = SourceError, *, max_bytes: int = MAX_BYTES
) -> str:
    """The text of a regular file in UTF-8. Raises `error`, also for one that is too large."""
    with open_regular(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise error(f"{path} has {size:,} bytes; such a file has {max_bytes:,} at most")
            return file.read(size).decode("utf-8")  # Python allocates as much as it is to read
        except UnicodeDecodeError as problem:
            raise error(f"{path} is not UTF-8 at byte {problem.start:,}") from None
        except OSError as problem:
            raise _unreadable(path, problem, error) from None


def read_json(
    path: str | os.PathLike[str], error: ErrorType = SourceError, *, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """The JSON object in a file, read strictly, see `parse_json`. Raises `error`."""
    return parse_json(read_text(path, error, max_bytes=max_bytes), str(path), error)


def parse_json(text: str, where: str, error: ErrorType = SourceError) -> dict[str, Any]:
    """The object that a text in JSON describes. where: what the text is, for messages.

    Raises `error` for a text that is no JSON or no object, and for what readers of JSON understand
    differently: a key that occurs twice, NaN and infinities, numbers beyond float64, half of a
    surrogate pair; and for objects nested more than 100 deep.
    """
    try:
        value = from_json(text, exact=False)
    except RecursionError:
        raise error(f"{where} is nested more than {MAX_DEPTH} deep") from None
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{where} holds no JSON object")
    if not _is_shallow(value):
        raise error(f"{where} is nested more than {MAX_DEPTH} deep")
    if _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise error(f"{where} is not valid JSON: it has half of a surrogate pair") from None
    return value


class Fields(pydantic.BaseModel):
    """Typed fields of an object that was read from a file, such as a config.json.

    A subclass declares the fields that it reads, with types and bounds; others are ignored.
    Nothing is converted: `"64"`, `64.5` and `true` are no `int`. Numbers are finite.
    """

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def parse(
        cls, raw: Mapping[Any, Any], where: str | os.PathLike[str], error: ErrorType = SourceError
    ) -> Self:
        """The fields of an object. where: what it was read from, for messages.

        Raises `error`, which names the first field that is missing or wrong and what is allowed.
        """
        try:
            return cls.model_validate(dict(raw))
        except pydantic.ValidationError as problem:
            raise error(f"{where}{_explained(problem)}") from None


def _check_regular(status: os.stat_result, path: str | os.PathLike[str], error: ErrorType) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise error(f"{path} is {kind}, not a file")


_KINDS: list[tuple[Callable[[int], bool], str]] = [
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
]


def _unreadable(path: str | os.PathLike[str], problem: Exception, error: ErrorType) -> Exception:
    if is_out_of_memory(problem):
        return problem
    reason = getattr(problem, "strerror", None) or str(problem)
    return error(f"{path} cannot be read: {reason}")


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def _is_shallow(value: object) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return True
    return False


_WORDINGS = {
    "a valid integer": "a whole number",
    "valid ": "",
    r"greater than or equal to (\S+)": r"\1 or more",
    r"less than or equal to (\S+)": r"\1 at most",
    "greater than ": "more than ",
}
_ALTERNATIVE = re.compile(r"(int|float|str|bool|none|list|dict|function|literal|constrained)\b.*")


def _explained(problem: pydantic.ValidationError) -> str:
    """What follows the name of a file: ` has no n_layer`, `: n_layer is 'x'; …`."""
    first = problem.errors(include_url=False)[0]
    first_key, *rest = first["loc"] or ("",)
    # Pydantic adds the alternatives of a type, such as `int | list[int]`, to the path.
    inner = [str(part) for part in rest if not _ALTERNATIVE.fullmatch(str(part))]
    key = ".".join([str(first_key), *inner])
    if first["type"] == "missing":
        return f" has no {key}"
    allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    for wording, ours in _WORDINGS.items():
        allowed = re.sub(wording, ours, allowed)
    return f": {key} is {shown(first['input'])}; it must be {allowed}"
