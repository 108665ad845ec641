"""Compiling a grammar on trial, in a process of its own where llguidance may fail badly.

llguidance stops with an error at most of what is too large: expressions, grammar symbols, nesting
in a text. What it does not limit overflows its stack or fills memory: chains of references or
rules, properties of one object, `allOf` of strings in each other, `multipleOf` of a large number.
So a grammar that is not plainly small is first compiled in a child process with limits on time,
memory and stack. What compiles there compiles here, on twice the stack.

This file is also the program of that process. It imports nothing of gptk, so that the process
starts in 50 ms, most of which takes the loading of llguidance.
"""

import contextlib
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 3
"""Of processor time."""
MEGABYTES = 400
STACK_MEGABYTES = 16


class TooLargeError(ValueError):
    """The child process ended without an answer."""


@functools.lru_cache(maxsize=256)
def problem_in_child(grammar: str, reader: str) -> str:
    """What `problem` says, found in a child process.

    Raises TooLargeError if it needs more time, memory or stack than it may have.
    """
    import llguidance

    packages = os.path.dirname(os.path.dirname(str(llguidance.__file__)))
    command = [sys.executable, "-I", "-S", __file__, packages, reader]
    try:
        done = subprocess.run(
            command,
            input=grammar.encode(),
            capture_output=True,
            timeout=4 * SECONDS,  # on the clock, for systems without the process's own limits
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TooLargeError(_limits()) from None
    except OSError as error:
        raise TooLargeError(f"cannot be compiled in a process of its own: {error}") from None
    answer = done.stdout.decode("utf-8", "replace")
    if done.returncode or not answer.startswith(_ANSWER):
        raise TooLargeError(_limits())
    return answer.removeprefix(_ANSWER)


def problem(llguidance: Any, grammar: str, reader: str = "check") -> str:
    """llguidance's message on a grammar that cannot be used, or "".

    reader: "check" compiles the grammar as far as it can without the vocabulary; "validate" only
    reads it, for grammars that name special tokens.
    """
    message = llguidance.LLMatcher.validate_grammar(grammar)
    if message or reader == "validate":
        return str(message)
    return str(first_matcher(llguidance, llguidance.LLTokenizer("byte"), grammar)[1])


def first_matcher(llguidance: Any, tokenizer: Any, grammar: str) -> tuple[Any, str]:
    """A matcher before its first token, and llguidance's message if it cannot be used, or ""."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    trial = matcher.deep_copy()
    mask = int.from_bytes(trial.compute_bitmask(), "little")
    if not trial.is_error():
        token = (mask & -mask).bit_length() - 1  # the first token that is allowed
        if token not in (-1, tokenizer.eos_token):
            trial.consume_token(token)
            trial.rollback(1)  # some features of llguidance's dialect do not support rollback
    return matcher, trial.get_error()


def on_stack(megabytes: int, compute: Callable[[], T]) -> T:
    """What `compute` returns, called in a thread with so large a stack."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(compute())
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(megabytes << 20)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


_ANSWER = "compiled: "


def _limits() -> str:
    return (
        f"llguidance needs more than {SECONDS} s, {MEGABYTES} MB of memory or {STACK_MEGABYTES} MB "
        "of stack to compile it; make it smaller, or chain fewer references and rules"
    )


def _limit_resources() -> None:
    """Limits of the operating system, where it has them."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _main() -> None:
    sys.path.append(sys.argv[1])
    grammar = sys.stdin.buffer.read().decode()
    import llguidance

    _limit_resources()

    def compile_it() -> None:
        answer = _ANSWER + problem(llguidance, grammar, sys.argv[2])
        sys.stdout.buffer.write(answer.encode())
        sys.stdout.buffer.flush()
        os._exit(0)  # what was compiled need not be taken apart

    on_stack(STACK_MEGABYTES, compile_it)


if __name__ == "__main__":
    _main()
