"""Running gptk and Python as separate processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

GPTK = str(Path(sys.executable).with_name("gptk"))


def run(*command):
    """The standard output of a command. Raises CalledProcessError if it fails."""
    words = list(map(str, command))
    return subprocess.run(
        words, check=True, capture_output=True, stdin=subprocess.DEVNULL, text=True
    ).stdout


class Engine:
    """An engine in a process of its own, see peer_process.py. It loads its model meanwhile.

    python: the program that runs it. environment: variables that it gets in addition.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        script = str(Path(__file__).with_name("peer_process.py"))
        self._name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, script, name, str(model), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def generate(self, ids: Sequence[int], new: int, beams: int = 1) -> float:
        """The seconds for exactly `new` tokens, as the process measures them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        work = {"ids": list(ids), "new": new, "beams": beams}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{json.dumps(work)}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        self._errors.seek(0)
        raise RuntimeError(f"{self._name} has ended: {self._errors.read()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def served(
    script: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Callable[[], None]]:
    """A function that makes a script in its own process do its work once; see `serve`."""
    path = Path(__file__).with_name(script)
    with subprocess.Popen(
        [sys.executable, str(path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def work() -> None:
            program.stdin.write("\n")
            program.stdin.flush()
            if program.stdout.readline() != "done\n":
                raise RuntimeError(f"{script} has ended")

        try:
            yield work
        finally:
            program.stdin.close()


def serve(work: Callable[[], object]) -> None:
    """Do the work for each line of standard input, and print "done" after each."""
    for _ in sys.stdin:
        work()
        print("done", flush=True)
