"""The layout of the core: floors, no import cycles, short files and functions, CONTRIBUTING."""

import ast
import graphlib
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "toolkit" / "gptk"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def imports():
    """The modules that each module of the core imports, type imports included."""
    graph = grimp.build_graph("gptk", exclude_type_checking_imports=False, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def floors():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["id"] == "rooms")
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def test_no_modules_import_each_other_in_a_cycle(imports):
    list(graphlib.TopologicalSorter(imports).static_order())


def test_a_cycle_would_be_found(imports):
    cyclic = imports | {"gptk.errors": {"gptk.decoding.run"}}
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(cyclic).static_order())


def test_a_room_imports_only_rooms_below_it(imports):
    """The same check as `make lint` makes with import-linter."""
    floor_of = {room: number for number, rooms in enumerate(floors()) for room in rooms}
    for module, imported in imports.items():
        room = module.split(".")[1] if "." in module else None
        for other in imported:
            other_room = other.split(".")[1] if "." in other else None
            if room in floor_of and other_room in floor_of and room != other_room:
                assert floor_of[room] < floor_of[other_room], f"{module} imports {other}"


def test_every_room_is_on_a_floor():
    rooms = {path.stem for path in CORE.iterdir() if path.suffix == ".py" or path.is_dir()}
    outside = {"__init__", "__main__", "__pycache__", "adapters", "py", "pytest_plugin", "testing"}
    assert rooms - outside == {room for rooms in floors() for room in rooms}


def test_at_most_a_dozen_files_are_at_the_top():
    assert len(list(CORE.glob("*.py"))) <= 12


def test_files_and_functions_are_short():
    lengths = []
    for path in CORE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
                assert lengths[-1] <= 60, f"{path}: {node.name}"
    assert statistics.median(lengths) <= 7


def test_contributing_has_the_rooms_from_the_top_floor_down():
    rows = re.findall(r"^\| `(\w+)` \|", CONTRIBUTING, re.MULTILINE)
    assert rows == [room for rooms in floors() for room in rooms]


def test_contributing_names_files_that_exist():
    named = re.findall(
        r"\b(?:toolkit|plugins|tests|docs|changes|benchmarks)/[\w./-]*", CONTRIBUTING
    )
    examples = ("second_best.py", "second-best.md", "+second-best.added.md", "changes/")
    for path in {name.rstrip(".") for name in named}:
        if not path.endswith(examples):
            assert (ROOT / path).exists(), path


def test_only_the_registry_imports_the_hooks_page(imports):
    importers = {module for module, found in imports.items() if "gptk.hooks.hookspecs" in found}
    assert importers == {"gptk.plugins.registry"}


PYTEST = re.findall(r"^    \.venv/bin/python (-m pytest .*)", CONTRIBUTING, re.MULTILINE)


@pytest.mark.parametrize("command", PYTEST)
def test_the_commands_of_contributing_find_tests(command):
    out = subprocess.run(
        [sys.executable, *command.split(), "--collect-only", "-q"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stdout
    assert re.search(r"\btests? collected|/\d+ tests collected", out.stdout)
