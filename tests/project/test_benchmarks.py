"""The benchmarks run, and write a page and a plot of their results."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """The output of `pytest benchmarks` with these arguments."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    out = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def table():
    """The module benchmarks/table.py."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks/table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_row_of_the_table_is_measured_by_one_benchmark(table):
    measured = [
        key
        for file in (ROOT / "benchmarks").glob("test_*.py")
        for marker in re.findall(r"mark\.peers\(([^)]*)\)", file.read_text())
        for key in re.findall(r'"(.+?)"', marker)
    ]
    assert sorted(measured) == sorted(table.ROWS)


@pytest.mark.slow
def test_peers_and_the_whole_grid_are_run_only_on_request():
    quick, peers = (
        {line for line in run("--collect-only", *options).splitlines() if "::" in line}
        for options in ([], ["-m", "peers", "--full"])
    )
    assert any("gpt2-124M" in test for test in quick)
    assert not any("gpt2-355M" in test or "beside" in test for test in quick)
    assert peers
    assert all("beside" in test for test in peers)


@pytest.mark.slow
def test_a_run_writes_its_speeds_and_their_share_of_the_limits(tmp_path):
    selected = "test_forward and cpu-tiny-float32 or test_training_step and tiny-float32"
    printed = run("-k", selected, "--write", str(tmp_path))
    page = (tmp_path / "results.md").read_text()
    for name in ("cpu-tiny-float32-4x32-prompt", "cpu-tiny-float32-1x32-token", "tiny-float32"):
        line = re.compile(rf"{name}.*\b\d[\d,.]* .*\d+ % of (memory|arithmetic)")
        assert line.search(printed)
        assert line.search(page)
    assert "GB/s" in page


def test_a_table_says_what_was_measured_and_what_is_missing(table, tmp_path):
    results = table.Table()
    times = {"gptk": 2.0, "other": 1.0, "peer": 4.0}
    results.row("q41", times, ["gptk", "other"], ["peer"], tokens=8)
    results.row("bf16", times, ["peer"], ["gptk"])
    results.skip("batch", "transformers is not installed")
    results.bound("memory", "750 MB", "under 700 MB", is_kept=False)
    cells = {row[0]: row[1:] for row in results.cells()}
    assert cells[table.ROWS["q41"].work] == (
        *("8.0 tokens/s", "llama.cpp, same file", "2.0 tokens/s", "4.00"),
    )
    assert cells[table.ROWS["bf16"].work][-1] == "0.50"
    assert cells[table.ROWS["batch"].work][-1] == "not measured: transformers is not installed"
    assert f"goal missed: {table.ROWS['bf16'].work}: 0.50, not 1.5" in results.lines()
    assert "goal missed: memory: 750 MB, not under 700 MB" in results.lines()
    assert not any(table.ROWS["q41"].work in line for line in results.lines() if "goal" in line)
    assert "other 8.0 tokens/s" in results.measured["q41"].note
    assert "| memory | 750 MB |" in results.markdown()
    assert "goal" not in results.markdown()
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    results.plot(first)
    results.plot(second)
    assert first.read_bytes() == second.read_bytes()


def test_writing_a_section_of_the_page_keeps_the_other_section(table, tmp_path):
    page = tmp_path / "results.md"
    table.write_section(page, "peers", "the first")
    table.write_section(page, "suite", "two")
    table.write_section(page, "peers", r"three \1")
    text = page.read_text()
    assert r"three \1" in text
    assert "two" in text
    assert "the first" not in text
