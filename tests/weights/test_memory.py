"""The memory that loading a model takes: the model's, and that of one tensor being converted."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import gptk
from gptk import kernels
from gptk.testing import tiny_gpt
from gptk.weights.saving import save_checkpoint

LARGE = gptk.GPTConfig(
    vocab_size=20_000, context_length=64, width=1024, n_layers=8, n_heads=8, n_kv_heads=2,
    head_dim=128, mlp_width=2048, norm="rms", positions="rotary", mlp="swiglu", mlp_bias=False,
    qkv_bias=False, out_bias=False, tied_head=False,
)  # fmt: skip
"""112 million parameters; the largest tensors, embedding and head, have 20 million each."""
LARGEST = LARGE.vocab_size * LARGE.width
SMALL = dataclasses.replace(LARGE, vocab_size=64, n_layers=1)

ROOM = 20e6 if kernels.available() else 40e6
"""For intermediate results, in chunks, and holes in the heap; more if each matrix is repacked."""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="peak memory is told by Linux's /proc"
)

# The small model first, so that what is loaded once for all models does not count.
PROGRAM = """
import json, pathlib, sys
import gptk

def resident(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

small, large, options = sys.argv[1:]
gptk.load(small, device="cpu", **json.loads(options)).generate([1, 2, 3], max_new_tokens=2)
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
lm = gptk.load(large, device="cpu", **json.loads(options))
peak = resident("VmHWM") - before
print(json.dumps([peak, sum(lm.model.bytes_by_kind().values())]))
"""


def loaded(small, large, **options):
    """In bytes: the peak of memory while loading, less that before, and the model's size."""
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small), str(large), json.dumps(options)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(out.stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By precision, a small model and a large one, saved by gptk as safetensors."""
    folder = tmp_path_factory.mktemp("saved")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        for size, config in (("small", SMALL), ("large", LARGE)):
            save_checkpoint(folder / f"{size}-{name}", tiny_gpt(config).to(dtype), None)
    return lambda size, name: folder / f"{size}-{name}"


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        ("bfloat16", {"dtype": "bfloat16"}),
        ("float32", {"dtype": "bfloat16"}),
        ("float32", {"dtype": "float32"}),
        ("bfloat16", {"dtype": "float32"}),
        ("bfloat16", {"dtype": "float16"}),
        ("bfloat16", {"quantize": "int8"}),
        ("float32", {"quantize": "int4"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_a_model_is_never_in_memory_twice(stored, options, saved):
    peak, model = loaded(saved("small", stored), saved("large", stored), **options)
    assert model > 90e6
    tensor = LARGEST * (2 if stored == "bfloat16" else 4)
    assert peak < model + tensor + ROOM


@pytest.mark.skipif(not kernels.available(), reason="without gptk's kernels it is expanded")
def test_smollm2_without_options_takes_little_memory(smollm2_path):
    """The model, 94 MiB of which no matrix is ever dense, the tokenizer and a generation."""
    program = """
import pathlib
import torch
import gptk
from gptk.language_model import load

def resident(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = resident("VmRSS")
lm = gptk.load("smollm2", device="cpu")
lm.generate("The capital of France is", max_new_tokens=16)
print(resident("VmHWM") - before, resident("VmHWM"))
"""
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    more, peak = map(int, out.stdout.split())
    assert more < 220e6
    assert peak < 700e6
