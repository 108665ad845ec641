"""Running gptk and Python as separate processes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GPTK = str(Path(sys.executable).with_name("gptk"))


def run(*command):
    """The standard output of a command. Raises CalledProcessError if it fails."""
    words = list(map(str, command))
    return subprocess.run(
        words, check=True, capture_output=True, stdin=subprocess.DEVNULL, text=True
    ).stdout


@contextmanager
def served(script: str) -> Iterator[Callable[[], None]]:
    """A function that makes a script in its own process do its work once; see `serve`."""
    path = Path(__file__).with_name(script)
    with subprocess.Popen(
        [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
