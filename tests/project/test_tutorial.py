"""docs/tutorial.md is run: its files are written, its commands executed in order and compared.

In a `console` block, `$ ` begins a command, and the other lines are its output (standard output and
error). `…` stands for any text within a line, and a line with `…` alone for any lines. A block with
a title is a file. Other blocks are not run.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from environments import fresh_environment

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
FENCE = re.compile(
    r'^```(?:console|\w+ title="(?P<file>[^"]+)")\n(?P<body>.*?)^```', re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.MULTILINE)


class Reader:
    """Follows the tutorial in a folder."""

    def __init__(self, folder: Path, programs: Path, **settings: str) -> None:
        self.folder = folder
        self.settings = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",  # so that output and errors come in order
            **settings,
        }

    def follow(self, text: str) -> None:
        for fence in FENCE.finditer(text):
            if fence["file"]:
                path = self.folder / fence["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(fence["body"], encoding="utf-8")
                continue
            for step in COMMAND.finditer(fence["body"]):
                output = self.run(step["command"])
                assert matches(step["output"], output), f"$ {step['command']}\n{output}"

    def run(self, command: str) -> str:
        if command.startswith("cd "):
            self.folder = self.folder / command.removeprefix("cd ")
            return ""
        out = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return out.stdout


def matches(shown: str, output: str) -> bool:
    """Whether the output is as shown, except for `…` and trailing spaces."""
    pattern = "".join(_patterns(shown.rstrip().splitlines()))
    return (
        re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in output.splitlines()))
        is not None
    )


def _patterns(shown: list[str]) -> Iterator[str]:
    for line in shown:
        if line.strip() == "…":
            yield r"(?:.*\n)*"
        else:
            yield ".*".join(map(re.escape, line.rstrip().split("…"))) + r"\n"


def test_shown_output_is_compared():
    assert matches("a …z\n…\nend\n", "a b z\n1\n2\nend\n")
    assert matches("", "")
    assert not matches("a\n", "a\nb\n")
    assert not matches("", "a\n")
    assert not matches("a …z\n", "a b y\n")


def test_every_block_of_the_tutorial_is_run_or_marked_as_text():
    text = TUTORIAL.read_text(encoding="utf-8")
    openings = re.findall(r"^```(\w+.*)$", text, re.MULTILINE)
    run = [fence[0].splitlines()[0][3:] for fence in FENCE.finditer(text)]
    assert [opening for opening in openings if opening not in run and opening != "text"] == []
    assert text.count("\n$ ") >= 8


def test_a_single_file_works_as_a_plug_in(tmp_path):
    Reader(tmp_path, Path(sys.executable).parent).follow(parts()["One file"])


@pytest.mark.slow
def test_the_whole_tutorial(tmp_path):
    environment = fresh_environment(tmp_path / "environment")
    folder = tmp_path / "work"
    folder.mkdir()
    bin_ = environment.python.parent
    for name in ("gptk", "pip", "pytest"):
        script = f'#!/bin/sh\nexec "{environment.python}" -m {name} "$@"\n'
        (bin_ / name).write_text(script)
        (bin_ / name).chmod(0o755)
    # Nothing is downloaded: the build requirements are installed.
    reader = Reader(
        folder,
        bin_,
        VIRTUAL_ENV=str(environment.folder),
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # for this variable of pip, 0 means yes
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    text = TUTORIAL.read_text(encoding="utf-8")
    reader.follow(text.replace("$ python -m build", "$ python -m build --no-isolation"))


def parts() -> dict[str, str]:
    """The text below each second-level heading."""
    _, *found = re.split(r"^## (.*)\n", TUTORIAL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))
