"""The distribution: its name, what its wheel has, and what happens beside another `gptk`."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import gptk
from environments import fresh_environment
from gptk import distribution

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the sources."""
    folder = tmp_path_factory.mktemp("wheels")
    build = ["build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run([sys.executable, "-m", *map(str, build)], check=True, capture_output=True)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture
def other_wheel(tmp_path) -> Path:
    """A wheel like that of the other project's gptk 0.4.0."""
    info = "gptk-0.4.0.dist-info"
    files = {
        "gptk/__init__.py": "__all__ = []\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: gptk\nVersion: 0.4.0\nSummary: Another",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = tmp_path / "gptk-0.4.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_the_name_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == distribution.NAME
    assert project["urls"]["Documentation"] == distribution.DOCS
    assert f"site_url: {distribution.DOCS}\n" in (ROOT / "mkdocs.yml").read_text()


def test_the_citation_has_the_version():
    assert f"\nversion: {gptk.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_page_or_message_installs_the_other_gptk():
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "examples", "toolkit", "plugins"):
        texts += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".md", ".py", ".template")]
    wrong = ("pip install gptk\n", "pip install gptk ", "pip install 'gptk[", '"gptk[', '"gptk>=')
    for path in texts:
        text = path.read_text()
        assert not [part for part in wrong if part in text], path


@pytest.mark.slow
def test_the_wheel_works_by_itself_in_a_fresh_environment(wheel, tmp_path):
    environment = fresh_environment(tmp_path / "environment", with_gptk=False)
    assert environment.run("gptk", "--version", check=False).returncode != 0
    environment.install(wheel)
    prompt = ("generate", "The capital of France is", "--max-new-tokens", "6")
    out = environment.run("gptk", *prompt)
    assert "Paris" in out.stdout
    program = subprocess.run(
        [environment.python.with_name("gptk"), "plugins"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "beam" in program.stdout
    where = environment.run("pip", "show", "--files", "gptk-decoding").stdout
    assert "gptk_command/__init__.py" in where
    assert "\n  tests/" not in where


@pytest.mark.slow
def test_a_plugin_package_needs_this_distribution(wheel, tmp_path):
    environment = fresh_environment(tmp_path / "environment", with_gptk=False)
    subprocess.run(
        [sys.executable, "-m", "gptk", "plugins", "new", "runner-up", "--kind", "sampler"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    report = environment.run(
        "pip", "--disable-pip-version-check", "install", "--dry-run", "--no-index",
        "--no-build-isolation", "--find-links", wheel.parent, "--quiet", "--report", "-",
        tmp_path / "gptk-runner-up",
    )  # fmt: skip
    found = {item["metadata"]["name"]: item for item in json.loads(report.stdout)["install"]}
    assert set(found) == {"gptk-runner-up", "gptk-decoding"}
    assert found["gptk-decoding"]["download_info"]["url"] == wheel.as_uri()


@pytest.mark.slow
def test_beside_the_other_gptk_the_program_says_so(wheel, other_wheel, tmp_path):
    environment = fresh_environment(tmp_path / "environment", with_gptk=False)
    environment.install(wheel)
    environment.install(other_wheel)
    program = environment.python.with_name("gptk")
    out = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert out.stderr.startswith("gptk: another project's package, gptk 0.4.0, is installed in")
    assert out.stderr.count("\n") == 1
    assert "pip uninstall --yes gptk gptk-decoding && pip install gptk-decoding" in out.stderr
    # Removing the other also removes gptk/__init__.py, which now counts as a file of the other.
    environment.run("pip", "uninstall", "--quiet", "--yes", "gptk")
    out = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert out.stderr.startswith("gptk: files of the package gptk are missing")
    assert out.stderr.count("\n") == 1
