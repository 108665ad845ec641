"""The program `gptk`, run in this process, and what it says when it fails."""

import contextlib
import io
import os
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from gptk.cli import main

GPTK = [sys.executable, "-m", "gptk"]


def gptk(*args: object, stdin: str = "", env: Mapping[str, str] | None = None) -> SimpleNamespace:
    """Run the program in this process with standard input piped: starting one takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["gptk", *map(str, args)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        mock.patch.dict(os.environ, env or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return SimpleNamespace(
        returncode=ended.value.code, stdout=out.getvalue(), stderr=err.getvalue()
    )


def without_notice(err: str) -> str:
    """Standard error without the notice of a machine that cannot run gptk's kernels."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if "kernels do not run here" not in line)


def failing(*args: object, code: int, **settings: Any) -> str:
    """The one line that the program says when it fails."""
    out = gptk(*args, **settings)
    assert out.returncode == code, out.stderr
    assert out.stdout == ""
    line: str
    (line,) = out.stderr.splitlines()
    assert line.startswith("gptk: ")
    assert "internal error" not in line
    return line
