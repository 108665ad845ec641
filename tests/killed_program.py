"""The program `gptk` in processes that tests end by signals, each started in milliseconds."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_PATIENCE = 60.0
"""Seconds that a process may take after the last signal, or for all it does."""


class ForkedProgram:
    """A process that has imported what the program needs, and forks for each run of it.

    In a `with` statement.
    """

    def __enter__(self) -> "ForkedProgram":
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def run(
        self,
        args: Sequence[object],
        stderr: Path,
        signals: Sequence[tuple[float, signal.Signals]] = (),
    ) -> tuple[int, int]:
        """Run the program until it ends.

        stderr: the file for what it says. signals: what is sent to it if it runs still, each with
        the seconds after its start.
        Returns the exit code, negative for a signal, and how many of the signals were sent.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = [[str(arg) for arg in args], str(stderr), signals]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code, sent = json.loads(self._process.stdout.readline())
        return code, sent


def _serve() -> None:
    """Run the program for each line of standard input."""
    for name in ("generate", "many", "compare", "compare_out"):
        __import__(f"gptk.cli.{name}")
    for name in ("training.processes", "language_model", "records.comparing", "plots.style"):
        __import__(f"gptk.{name}")
    from gptk.plugins.kinds import KINDS
    from gptk.plugins.registry import failures

    assert not list(failures(KINDS))  # finds and imports the plug-ins
    caught = {signal.SIGINT, signal.SIGTERM}
    for line in iter(sys.stdin.readline, ""):
        args, stderr, signals = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, caught)  # until main() has begun
        child = os.fork()
        if child == 0:
            _run(args, stderr)
        start, sent = time.monotonic(), 0
        status = None
        for seconds, number in signals:
            status = _wait(child, start + seconds)
            if status is not None:
                break
            os.kill(child, number)
            sent += 1
        if status is None:
            status = _wait(child, time.monotonic() + _PATIENCE)
        if status is None:
            os.kill(child, signal.SIGUSR1)  # it writes where its threads are
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"goes on after {_PATIENCE:g} s\n{Path(stderr).read_text()}")
        print(json.dumps([os.waitstatus_to_exitcode(status), sent]), flush=True)


def _run(args: Sequence[str], stderr: str) -> NoReturn:
    """The program, in this process, which ends as any that Python has started."""
    import gptk_command

    nothing, said = os.open(os.devnull, os.O_RDWR), os.open(stderr, os.O_WRONLY | os.O_CREAT)
    for descriptor, replaced in ((nothing, 0), (nothing, 1), (said, 2)):
        os.dup2(descriptor, replaced)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - as new, nothing read of it
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.argv = ["gptk", *args]
    gptk_command.find_problem = _unblock
    gptk_command.main()


def _unblock() -> None:
    """What main() calls first."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _wait(child: int, end: float) -> int | None:
    """The status of a child that ends before a moment, else None."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() >= end:
            return None
        time.sleep(0.0005)


if __name__ == "__main__":
    _serve()
