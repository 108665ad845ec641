"""benchmarks/on_gpu.sh where there is no GPU, and its measurements with tiny models on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@NEEDS_NO_GPU
def test_without_a_gpu_all_is_skipped_with_the_reason(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text("<!-- gpu -->\nbefore\n<!-- end of gpu -->\n")
    done = subprocess.run(
        [ROOT / "benchmarks" / "on_gpu.sh", page],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout
    assert "passed" not in done.stdout
    assert "skipped: no CUDA device" in done.stdout.splitlines()[-1]
    assert "before" in page.read_text()


def test_it_says_which_python_it_needs(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "benchmarks" / "on_gpu.sh"],
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "cannot import torch and gptk; name one that can: PYTHON=" in done.stderr


@pytest.mark.slow
def test_every_part_of_it_is_measured_on_a_cpu(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    page = tmp_path / "gpu.md"
    page.write_text("<!-- gpu -->\nbefore\n<!-- end of gpu -->\n")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "on_gpu.py", "--try", "--write", page],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert "before" not in text
    for part in ("one row, greedy |", "3 rows", "2 beams", "a prompt of 12", "training", "int4"):
        assert part in text
