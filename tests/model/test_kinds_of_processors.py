"""Every precision on every kind of processor that this one can act as."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints
from gptk.kernels import build

NO_KERNELS = {"GPTK_KERNELS": "none"}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
SSE = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}
KINDS = {
    "as it is": {},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "GPTK_KERNELS": "avx512"},
    "AVX-512, no kernels": NO_KERNELS,
    "AVX-512 without bfloat16, no kernels": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", **NO_KERNELS},
    "AVX2 with VNNI": {**AVX2, "GPTK_KERNELS": "avx2-vnni"},
    "AVX2": {**AVX2, "GPTK_KERNELS": "avx2"},
    "AVX2, no kernels": {**AVX2, **NO_KERNELS},
    "SSE": {**SSE, "GPTK_KERNELS": "plain"},
    "SSE, no kernels": {**SSE, **NO_KERNELS},
}


def run(kind, path):
    allowed = {found.name for found in build.runnable()} | {None, "none"}
    if (name := KINDS[kind].get("GPTK_KERNELS")) not in allowed:
        pytest.skip(f"this processor does not run {name}")
    out = subprocess.run(
        [sys.executable, Path(__file__).with_name("every_precision.py"), path],
        env=os.environ | KINDS[kind], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["Q4_1", "Q8_0", "F32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_precision_works(kind, form, tmp_path):
    """The oracle is the model in float32."""
    checkpoints.write_gguf(tmp_path / "model.gguf", checkpoints.random_model("qwen2"), form)
    told = run(kind, tmp_path / "model.gguf")
    assert not {name: one["raised"] for name, one in told["found"].items() if "raised" in one}
    losses = [one["loss"] for one in told["found"].values() if "loss" in one]
    assert max(losses) - min(losses) < 0.02 * losses[0]
    for name, one in told["found"].items():
        if "error" in one:
            rounded = "int" in name or "float16" in name
            assert one["error"] < (0.5 if "int4" in name else 0.15 if rounded else 1e-4), name
            assert one["same"] or rounded, name
    named = KINDS[kind].get("GPTK_KERNELS")
    assert (told["kernels"] is None) == (named != "none"), told["kernels"]
    assert told["found"]["auto auto"]["model"] == "torch.float32"


@pytest.mark.slow
def test_a_slow_path_says_so_once_why_and_what_to_do(tmp_path):
    checkpoints.write_gguf(tmp_path / "model.gguf", checkpoints.random_model("qwen2"), "Q4_1")
    told = run("AVX2, no kernels", tmp_path / "model.gguf")
    assert len(told["notices"]) == len(set(told["notices"]))
    expected = (
        ("kernels do not run here: ", "expanded to float32 (--dtype bfloat16 keeps them"),
        ("no instructions for bfloat16", "--dtype float32 is faster"),
        ("no instructions for float16", "--dtype float32 is faster"),
        ("no instructions for bfloat16; training in float32 is faster",),
    )
    for parts in expected:
        assert any(all(part in notice for part in parts) for notice in told["notices"]), parts
