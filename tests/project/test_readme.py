"""Every example in the README and the docs runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LONG = {"chapter.md", "training.md"}
"""Pages whose examples train models."""
EXAMPLES = [
    pytest.param(
        language,
        code,
        id=f"{page.name}-{number}",
        marks=[pytest.mark.slow] if page.name in LONG else [],
    )
    for page in PAGES
    for number, (language, code) in enumerate(FENCE.findall(page.read_text()), start=1)
]


def test_the_readme_has_five_examples():
    assert len(FENCE.findall(PAGES[0].read_text())) == 5


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_example_runs(language, code, tmp_path):
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    out = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    if language == "bash":
        assert out.stdout.strip()
