"""Run many hostile inputs in a child process, and say which of them did harm.

An input does harm if it raises anything but an error that gptk raises on purpose, blames a
plug-in, ends the process by a signal, takes more than 20 s, or takes more memory than is allowed.

The child is this file run as a program. It imports a test's module, calls the test with a stand-in
for the fixture `attack` to get its two functions, and runs them for the seeds that it is told.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Input = TypeVar("Input")

SECONDS = 20.0
"""How long an input may take."""
BYTES = 500 * 10**6
"""How much memory an input may take above what the process had before it."""


@dataclass(frozen=True)
class Target:
    """What a test attacks."""

    make: Callable[[random.Random], Any]
    """Makes an input from a random stream alone."""
    run: Callable[[Any], object]
    """Reads the input. The current directory is an empty folder that it may write to."""
    expanded_bytes: Callable[[Any], int]
    """How many bytes the tensors of an input take when expanded; three times these are allowed."""
    plugin_errors: bool
    """Whether an error may blame a plug-in, because the input is one."""


@dataclass(frozen=True)
class Harm:
    """What an input did."""

    seed: int
    what: str

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.what}"


class Attacker:
    """A child process that runs inputs; a new one is started when it has ended."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._target: tuple[str, str] | None = None
        self._received = b""

    def attack(self, file: Path, test: str, seeds: Iterable[int]) -> Iterator[Harm | None]:
        """For each seed the harm that its input did, or None."""
        for seed in seeds:
            child = self._child_for(str(file), test)
            yield self._try(child, seed)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _child_for(self, file: str, test: str) -> "subprocess.Popen[bytes]":
        if self._target is not None and self._target[0] != file:
            self.close()  # a test's module may change the process that it is imported in
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._target, self._received = None, b""
        if self._target != (file, test):
            self._send({"file": file, "test": test})
            ready = self._answer(time.monotonic() + 120, None)
            if ready is None or "ready" not in ready:
                self.close()
                raise RuntimeError(f"{test} cannot be attacked: {ready}")
            self._target = (file, test)
        return self._child

    def _try(self, child: "subprocess.Popen[bytes]", seed: int) -> Harm | None:
        self._send({"seed": seed})
        started = self._answer(time.monotonic() + SECONDS, None)
        allowed = None if started is None else started.get("allowed")
        answer = self._answer(time.monotonic() + SECONDS, allowed) if started else None
        if answer is not None:
            what = answer["harm"]
            return None if what is None else Harm(seed, what)
        time.sleep(0.1)
        code = child.poll()
        if code is None:
            what = f"over {SECONDS:.0f} s, or over the memory allowed"
        else:
            what = f"the process ended with {code}"
        self.close()
        return Harm(seed, what)

    def _send(self, message: dict[str, object]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()

    def _answer(self, deadline: float, allowed: int | None) -> dict[str, Any] | None:
        """The child's next message; None if it ends, is too slow, or takes too much memory."""
        assert self._child is not None
        assert self._child.stdout is not None
        while time.monotonic() < deadline:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                answer: dict[str, Any] = json.loads(line)
                return answer
            if select.select([self._child.stdout], [], [], 0.1)[0]:
                received = os.read(self._child.stdout.fileno(), 1 << 16)
                if not received:
                    return None
                self._received += received
            # The child says itself how much an input took; here only what grows without an end
            # is stopped.
            if allowed is not None and _memory(self._child.pid, "VmRSS") > 2 * allowed + 10**9:
                return None
        return None


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """The data with one to four changes: bits, numbers, pieces cut out, doubled, moved."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = rng.randrange(len(changed) + 1)
        length = min(rng.choice([1, 2, 4, 8, 64, 1000]), len(changed) - place)
        kind = rng.randrange(7)
        if kind == 0 and changed and length:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length] * rng.choice([1, 2, 100])
        elif kind == 4:
            del changed[place:]
        elif kind == 5:
            number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**9, 255])
            size = rng.choice([1, 2, 4, 8])
            changed[place : place + size] = (number % 256**size).to_bytes(size, "little")
        else:
            source = rng.randrange(len(changed) + 1)
            changed[place : place + length] = changed[source : source + length]
    return bytes(changed)


def mutated_text(rng: random.Random, text: str) -> str:
    """The text with one to four changes: characters cut out, doubled, put in."""
    odd = ["\0", "\x7f", "\ud800", "\U0001f600", "é", "\n", "\r\n", " ", '"', "'", "\\", "{", "}"]
    odd += ["[", "]", "(", ")", ",", ":", "=", "%", "9" * 400, "-1", "1e999", "NaN", "%s", "\u202e"]
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(text) + 1)
        length = rng.choice([1, 1, 3, 20])
        put_in = rng.choice(["", rng.choice(odd), text[place : place + length] * 2])
        text = text[:place] + put_in + text[place + rng.choice([0, length]) :]
    return text


def mutated_json(rng: random.Random, value: object) -> str:
    """JSON text of the value with one to three changes: wrong types, numbers that are huge or not
    finite, deep nesting, keys that are missing, unknown or doubled, and text that is no JSON."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _mutated_part(rng, value)
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    if rng.random() < 0.1:
        keys = re.findall(r'"[^"]*": ?(?:\d+|"[^"]*"|true|false|null)', text)
        if keys:
            text = text.replace("{", "{" + rng.choice(keys) + ",", 1)
    if rng.random() < 0.05:
        text = mutated_text(rng, text)
    return text


# Marks in strings, replaced by what json.dumps would not write.
_RAW = {
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@huge": "9" * 5000,
    "@overflow": "1e999",
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@objects": '{"a":' * 20_000 + "1" + "}" * 20_000,
}


def _mutated_part(rng: random.Random, value: object) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        copy = dict(value)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[rng.choice(["", "unknown", key + "_", key.upper()])] = _odd_value(rng)
        else:
            copy[key] = _mutated_part(rng, value[key])
        return copy
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        kind = rng.randrange(8)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return [*value[:place], *[value[place]] * rng.choice([2, 3, 1000]), *value[place:]]
        return [*value[:place], _mutated_part(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([-value, value + 1, value * 1000, value / 3, 0, str(value)])
    return _odd_value(rng)


def _odd_value(rng: random.Random) -> object:
    values: list[object] = [None, True, False, 0, -1, 1, 0.5, 1e-300, 2**31, 2**63, 10**30, "", "x"]
    values += [
        "\ud800",
        "\0",
        "../../x",
        "/dev/zero",
        [],
        {},
        [[]],
        [None],
        {"": None},
        "a" * 10**5,
    ]
    return rng.choice([*values, *_RAW])


def _memory(pid: int | str, field: str) -> int:
    """A field of /proc/PID/status, in bytes; 0 if the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def _serve() -> None:
    """The child: answer a line of JSON with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    messages = os.fdopen(os.dup(0), "r", encoding="utf-8")
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)

    def answer(message: dict[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    folder = Path(tempfile.mkdtemp(prefix="gptk-attack-"))
    target: Target | None = None
    try:
        for line in messages:
            message = json.loads(line)
            if "file" in message:
                try:
                    target = _find_target(message["file"], message["test"])
                    answer({"ready": True})
                except BaseException:
                    answer({"error": traceback.format_exc()})
            else:
                assert target is not None
                _run(target, message["seed"], folder, answer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_target(file: str, test: str) -> Target:
    sys.path[:0] = [str(Path(file).parent), str(Path(file).parent.parent)]
    name = Path(file).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    found: list[Target] = []
    function = inspect.unwrap(getattr(sys.modules[name], test))
    function(lambda *parts, **options: found.append(make_target(*parts, **options)))
    (target,) = found
    return target


def make_target(
    make: Callable[[random.Random], Input],
    run: Callable[[Input], object],
    *,
    expanded_bytes: Callable[[Input], int] = lambda _: 0,
    plugin_errors: bool = False,
) -> Target:
    """The arguments of the fixture `attack`, see Target."""
    return Target(make, run, expanded_bytes, plugin_errors)


def _run(
    target: Target, seed: int, folder: Path, answer: Callable[[dict[str, object]], None]
) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    os.chdir(folder)
    attacked = target.make(random.Random(seed))
    allowed = max(BYTES, 3 * target.expanded_bytes(attacked))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _memory("self", "VmRSS")
    answer({"allowed": before + allowed})
    start = time.monotonic()
    harm = _harm(target, attacked)
    seconds, taken = time.monotonic() - start, _memory("self", "VmHWM") - before
    if harm is None and seconds > SECONDS:
        harm = f"took {seconds:.1f} s"
    if harm is None and taken > allowed:
        harm = f"took {taken / 1e6:.0f} MB, {allowed / 1e6:.0f} MB allowed"
    answer({"harm": harm})


def _harm(target: Target, attacked: object) -> str | None:
    import click

    from gptk.errors import GptkError, InternalError, PluginError

    try:
        target.run(attacked)
    except InternalError as error:
        return f"a fault of gptk: {error}"
    except PluginError as error:
        return None if target.plugin_errors else f"blames a plug-in: {error}"
    except (click.ClickException, click.exceptions.Exit):
        return None  # the program makes one line of click's messages when it prints them
    except GptkError as error:
        return f"a message of several lines: {error}" if "\n" in str(error).strip() else None
    except BaseException:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    _serve()
