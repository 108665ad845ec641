"""The example package as a user has it: installed, found by gptk, used, and its tests run."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_readme import FENCE

import gptk
from environments import fresh_environment
from gptk.testing import tiny_lm

EXAMPLE = Path(__file__).parents[2] / "examples" / "gptk-lz-penalty"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package, so that tests write nothing to the repository."""
    folder = tmp_path_factory.mktemp("example") / "gptk-lz-penalty"
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", ".venv", "dist")
    return Path(shutil.copytree(EXAMPLE, folder, ignore=ignored))


@pytest.fixture(scope="module")
def environment(package):
    environment = fresh_environment(package.parent / "venv")
    environment.install(f"{package}[test]")
    return environment


@pytest.fixture
def example_module(monkeypatch):
    """The plug-in, registered as a module without being installed."""
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    module = importlib.import_module("gptk_lz_penalty")
    gptk.plugins.register(module)
    yield module
    gptk.plugins.unregister(module)


def test_the_example_works_as_a_registered_module(example_module):
    lm = tiny_lm()
    settings = {"sampler": "beam:width=3", "max_new_tokens": 12, "seed": 0}
    plain = lm.generate("abababab", **settings)
    assert lm.generate("abababab", processors=["lz-penalty:strength=0"], **settings) == plain
    assert lm.generate("abababab", processors=["lz-penalty:strength=3"], **settings) != plain


def test_the_example_uses_only_public_names_of_gptk():
    for file in (EXAMPLE / "src").rglob("*.py"):
        code = file.read_text()
        assert not re.search(r"^\s*(from|import) gptk(\.|_plugins)", code, re.MULTILINE)
        assert set(re.findall(r"\bgptk\.(\w+)", code)) <= set(gptk.__all__)


@pytest.mark.slow
def test_gptk_lists_the_installed_example(environment):
    listed = environment.run("gptk", "plugins").stdout
    (line,) = [line for line in listed.splitlines() if "lz-penalty" in line and "processor" in line]
    assert "gptk-lz-penalty 0.1.0" in line
    shown = environment.run("gptk", "plugins", "show", "lz-penalty").stdout
    assert all(option in shown for option in ("strength", "window", "buffer"))


@pytest.mark.slow
def test_the_installed_example_decodes(environment, smollm2_path):
    def text(*processor):
        return environment.run(
            "gptk", "generate", "one two three one two three one two three one",
            "--model", smollm2_path, "--sampler", "greedy", "--max-new-tokens", 6, *processor,
        ).stdout  # fmt: skip

    assert text().split()[:3] == ["two", "three", "one"]
    assert text("--processor", "lz-penalty:strength=2").split()[:3] != ["two", "three", "one"]


@pytest.mark.slow
def test_the_tests_of_the_installed_example_pass(environment, package):
    out = environment.run("pytest", "-q", "-p", "no:cacheprovider", cwd=package)
    assert " passed" in out.stdout
    assert "skipped" not in out.stdout


@pytest.mark.slow
def test_the_examples_readme_runs(environment, package):
    gptk_program = environment.folder / "bin" / "gptk"
    gptk_program.write_text(f'#!/bin/sh\nexec "{environment.python}" -m gptk "$@"\n')
    gptk_program.chmod(0o755)
    blocks = FENCE.findall((package / "README.md").read_text())
    assert len(blocks) >= 2
    for language, code in blocks:
        command = ["bash", "-euc", code] if language == "bash" else [environment.python, "-c", code]
        out = subprocess.run(
            command,
            cwd=package,
            env=os.environ | {"PATH": f"{gptk_program.parent}{os.pathsep}{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert out.returncode == 0, out.stderr
        assert out.stdout.strip()
