"""Triton's attention without a GPU: in Triton's interpreter, and compiled to machine code."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptk.kernels import BLOCK, gpu
from gptk.kernels.gpu import tiling

MODULE = "gptk.kernels.triton_attention"


@pytest.fixture
def compiled(monkeypatch):
    """The kernels as they are compiled."""
    pytest.importorskip("triton", reason="triton is not installed; `make test-slow` installs it")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]


@pytest.mark.slow
def test_in_tritons_interpreter():
    """The tests in in_tritons_interpreter.py."""
    pytest.importorskip("triton", reason="triton is not installed; `make test-slow` installs it")
    file = Path(__file__).with_name("in_tritons_interpreter.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


def machine_code(module, capability, dtype, few, d=64, group=3, kv_heads=3):
    """The kernels for a GPU, by Triton's own compiler and NVIDIA's assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    tiles = tiling(dtype, few=few)
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}[dtype]
    head = {"d": d, "d_padded": max(16, gpu.power_of_two(d))}
    sizes = head | {"kv_heads": kv_heads, "group": group}
    sizes |= {"slab_size": 16, "block_size": BLOCK}
    queries = max(tiles.queries, gpu.power_of_two(group))
    more = {"parts": tiles.parts, "group_padded": gpu.power_of_two(group), "queries": queries}
    where = {"qkv": kind, "tiles": "*i64", "tables": "*i64", "slabs": "*i64"}
    where |= {"keys_at": "i32", "values_at": "i32"}
    sums = dict.fromkeys(("sums", "tops", "totals"), "*fp32")
    target = GPUTarget("cuda", capability, 32)
    stages = {"num_stages": 1 if dtype == torch.float32 else 2}
    return [
        compile(
            ASTSource(module._store, where, constexprs=sizes | {"tokens": tiles.tokens(group)}),
            target=target,
        ),
        compile(
            ASTSource(module._attend, where | {"scale": "fp32"} | sums, constexprs=sizes | more),
            target=target,
            options=stages,
        ),
        compile(
            ASTSource(module._join, sums | {"y": kind}, constexprs=head | {"parts": tiles.parts}),
            target=target,
        ),
    ]


SHARED_MEMORY = 99 << 10
"""Bytes that a program may use on every GPU of compute capability 8.0 and more, the least of them
(8.6 and 8.9) by the table in NVIDIA's CUDA C++ Programming Guide."""


@pytest.mark.slow
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_and_fits_into_their_memory(
    capability, dtype, few, compiled, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    largest = 512 // dtype.itemsize
    for d, group, kv_heads in ((64, 3, 3), (largest, 8, 2)):
        assert gpu.why_not_triton() is None
        for kernel in machine_code(compiled, capability, dtype, few, d, group, kv_heads):
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= SHARED_MEMORY
            if dtype == torch.bfloat16 and kernel.metadata.name == "_attend":
                assert "mma" in kernel.asm["ptx"]  # tensor cores


def test_where_triton_cannot_compile_it_says_why(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.why_not_triton.cache_clear()
    assert gpu.why_not_triton() == "Triton is not installed; install the package triton"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    gpu.why_not_triton.cache_clear()
    assert "no C compiler" in gpu.why_not_triton()
    gpu.why_not_triton.cache_clear()
