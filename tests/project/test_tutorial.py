"""What docs/tutorial.md shows is what happens: its files are written, its commands run in order.

In a block `console` a line after `$ ` is a command, and the rest is what it says, on standard
output or error. `…` stands for anything within a line, and a line of its own for any lines. A block
with a title is a file. Blocks of other kinds are only shown.
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
COMMAND = re.compile(r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<said>(?:(?!\$ ).*\n)*)", re.MULTILINE)


class Reader:
    """Somebody who does what the tutorial says, in a folder of their own."""

    def __init__(self, folder: Path, programs: Path, **settings: str) -> None:
        self.folder = folder
        self.settings = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",  # so that output and errors come in their order
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
                said = self.run(step["command"])
                assert matches(step["said"], said), f"$ {step['command']}\n{said}"

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


def matches(shown: str, said: str) -> bool:
    """Whether what was said is what is shown, but for what `…` stands for and spaces at ends."""
    pattern = "".join(_patterns(shown.rstrip().splitlines()))
    return (
        re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in said.splitlines()))
        is not None
    )


def _patterns(shown: list[str]) -> Iterator[str]:
    for line in shown:
        if line.strip() == "…":
            yield r"(?:.*\n)*"
        else:
            yield ".*".join(map(re.escape, line.rstrip().split("…"))) + r"\n"


def test_what_is_shown_is_compared():
    assert matches("a …z\n…\nend\n", "a b z\n1\n2\nend\n")
    assert matches("", "")
    assert not matches("a\n", "a\nb\n")
    assert not matches("", "a\n")
    assert not matches("a …z\n", "a b y\n")


def test_every_block_of_the_tutorial_is_run_or_known_to_be_only_shown():
    text = TUTORIAL.read_text(encoding="utf-8")
    openings = re.findall(r"^```(\w+.*)$", text, re.MULTILINE)
    run = [fence[0].splitlines()[0][3:] for fence in FENCE.finditer(text)]
    assert [one for one in openings if one not in run and one != "text"] == []
    assert text.count("\n$ ") >= 8


def test_a_single_file_is_a_plug_in(tmp_path):
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
    # Nothing is fetched: what a build needs is there.
    reader = Reader(
        folder,
        bin_,
        VIRTUAL_ENV=str(environment.folder),
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # pip's way of saying yes
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    text = TUTORIAL.read_text(encoding="utf-8")
    reader.follow(text.replace("$ python -m build", "$ python -m build --no-isolation"))


def parts() -> dict[str, str]:
    """The text below each heading of the second level."""
    _, *found = re.split(r"^## (.*)\n", TUTORIAL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))
