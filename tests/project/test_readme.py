"""Every example in the README and the docs runs."""

import importlib.util
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
EXTRAS = {"gptk.adapters.ray": "ray", "gptk lm-eval": "lm_eval"}
"""What examples use -> the package, which `make test-slow` installs."""


def marks(page, code):
    extras = [package for use, package in EXTRAS.items() if use in code]
    for package in extras:
        if importlib.util.find_spec(package) is None:
            yield pytest.mark.skip(reason=f"{package} is not installed")
    if extras or page.name in LONG:
        yield pytest.mark.slow


EXAMPLES = [
    pytest.param(language, code, id=f"{page.name}-{number}", marks=[*marks(page, code)])
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
