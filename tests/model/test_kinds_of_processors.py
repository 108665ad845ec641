"""Every precision on every kind of processor that this one can act as."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints

NO_COMPILER = {"CXX": "/nonexistent"}
KINDS = {
    "as it is": {},
    "AVX-512, no compiler": NO_COMPILER,
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", **NO_COMPILER},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", **NO_COMPILER},
    "SSE": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", **NO_COMPILER},
}


def run(kind, path, tmp_path):
    cache = {} if kind == "as it is" else {"GPTK_CACHE": str(tmp_path / "cache")}
    out = subprocess.run(
        [sys.executable, Path(__file__).with_name("every_precision.py"), path],
        env=os.environ | KINDS[kind] | cache, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["Q4_1", "Q8_0", "F32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_precision_works(kind, form, tmp_path):
    """The oracle is the model in float32."""
    checkpoints.write_gguf(tmp_path / "model.gguf", checkpoints.random_model("qwen2"), form)
    told = run(kind, tmp_path / "model.gguf", tmp_path)
    assert not {name: one["raised"] for name, one in told["found"].items() if "raised" in one}
    losses = [one["loss"] for one in told["found"].values() if "loss" in one]
    assert max(losses) - min(losses) < 0.02 * losses[0]
    for name, one in told["found"].items():
        if "error" in one:
            rounded = "int" in name or "float16" in name
            assert one["error"] < (0.5 if "int4" in name else 0.15 if rounded else 1e-4), name
            assert one["same"] or rounded, name
    assert told["found"]["auto auto"]["model"] == "torch.float32"


@pytest.mark.slow
def test_a_slow_path_says_so_once_why_and_what_to_do(tmp_path):
    checkpoints.write_gguf(tmp_path / "model.gguf", checkpoints.random_model("qwen2"), "Q4_1")
    told = run("AVX2", tmp_path / "model.gguf", tmp_path)
    assert len(told["notices"]) == len(set(told["notices"]))
    expected = (
        ("kernels do not run here: ", "expanded to float32 (--dtype bfloat16 keeps them"),
        ("no instructions for bfloat16", "--dtype float32 is faster"),
        ("no instructions for float16", "--dtype float32 is faster"),
        ("no instructions for bfloat16; training in float32 is faster",),
    )
    for parts in expected:
        assert any(all(part in notice for part in parts) for notice in told["notices"]), parts
