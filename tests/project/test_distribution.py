"""The distribution: its name, what its wheel has, and what happens beside another `gptk`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import gptk
from environments import fresh_environment
from gptk import distribution
from gptk.kernels import build
from gptk.kernels.instructions import INSTRUCTION_SETS
from gptk.system import processor

ROOT = Path(__file__).parents[2]


def build_wheel(folder: Path, machine: str) -> Path:
    """The wheel, built from the sources for a kind of processor, or `none`."""
    arguments = ["build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    environment["GPTK_WHEEL"] = machine
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel without compiled kernels."""
    return build_wheel(tmp_path_factory.mktemp("wheels"), "none")


@pytest.fixture(scope="module")
def platform_wheel(tmp_path_factory) -> Path:
    """The wheel for this machine, with compiled kernels."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")
    return build_wheel(tmp_path_factory.mktemp("platform-wheels"), processor.machine())


def libraries_of(wheel: Path, folder: Path) -> dict[str, Path]:
    """The compiled kernels of a wheel by instruction set, unpacked into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("gptk/kernels/compiled/")]
        return {Path(name).stem: Path(archive.extract(name, folder)) for name in names}


def versions(library: Path, of: str) -> list[tuple[int, ...]]:
    """The versions that a library needs of another, such as GLIBC, the oldest first."""
    out = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True)
    found = re.findall(rf"\({of}_([0-9.]+)\)", out.stdout)
    return sorted(tuple(map(int, version.split("."))) for version in found)


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


def test_without_compiled_kernels_a_wheel_is_for_any_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_a_wheel_has_the_kernels_of_all_instruction_sets(platform_wheel, tmp_path):
    """manylinux_2_28, PyTorch's own platform, allows glibc 2.28 and what GCC 8 has (PEP 600)."""
    libraries = libraries_of(platform_wheel, tmp_path)
    machines = (None, processor.machine())
    assert set(libraries) == {found.name for found in INSTRUCTION_SETS if found.machine in machines}
    newest = max(versions(library, "GLIBC")[-1] for library in libraries.values())
    assert newest <= (2, 28)
    tag = f"manylinux_2_{newest[1]}_{processor.machine()}"
    assert platform_wheel.name.endswith(f"-py3-none-{tag}.whl")
    for library in libraries.values():
        assert max(versions(library, "GLIBCXX")) <= (3, 4, 25)
        assert max(versions(library, "CXXABI")) <= (1, 3, 11)
        needed = subprocess.run(
            ["readelf", "--dynamic", library], capture_output=True, text=True, check=True
        )
        names = re.findall(r"Shared library: \[([^]]*)\]", needed.stdout)
        system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
        assert {name for name in names if not name.startswith("ld-linux")} <= system


@pytest.mark.slow
def test_an_installed_wheel_runs_its_kernels_without_a_compiler(
    platform_wheel, tmp_path, monkeypatch
):
    environment = fresh_environment(tmp_path / "environment", with_gptk=False)
    environment.install(platform_wheel)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "cache"))
    features = processor.features()
    for instructions in INSTRUCTION_SETS:
        if instructions.runs_on(processor.machine(), features):
            monkeypatch.setenv("GPTK_KERNELS", instructions.name)
            told = environment.run("gptk", "info").stdout
            assert (
                f"\nkernels: gptk ({instructions.words}, installed with gptk) and PyTorch\n" in told
            )
            prompt = ("generate", "The capital of France is", "--max-new-tokens", "6")
            assert "Paris" in environment.run("gptk", *prompt).stdout
    assert not (tmp_path / "cache" / "code").exists()
    monkeypatch.delenv("GPTK_KERNELS")
    best = build.runnable()[0].words
    assert f"gptk ({best}, installed" in environment.run("gptk", "info").stdout


@pytest.mark.slow
def test_a_wheel_is_built_for_arm_on_another_machine(tmp_path):
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs the Debian package g++-aarch64-linux-gnu")
    wheel = build_wheel(tmp_path / "wheel", "aarch64")
    libraries = libraries_of(wheel, tmp_path)
    assert set(libraries) == {"neon", "neon-i8mm", "plain"}
    for library in libraries.values():
        header = subprocess.run(
            ["readelf", "--file-header", library], capture_output=True, text=True, check=True
        )
        assert re.search(r"Machine: +AArch64", header.stdout)
        assert versions(library, "GLIBC")[-1] <= (2, 28)
    assert re.search(r"-py3-none-manylinux_2_(17|2[0-8])_aarch64\.whl$", wheel.name)


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
