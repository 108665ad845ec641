"""gptk and its peers as on a processor with AVX2 and no more, each in a process of its own.

gptk and PyTorch are told not to use AVX-512. llama.cpp is compiled without it, in an environment
whose Python $LLAMA_AVX2_PYTHON names:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF" \\
        pip install llama-cpp-python
"""

import contextlib

import pytest

from engines import FLASH, python_of, smollm2_file
from models import AVX2, precision, prompt
from programs import Engine
from turns import in_turns

IDS = [504, 3575, 282, 4649, 314]  # SmolLM2's "The capital of France is"
NEW = 128
CONTEXT = 512 + NEW + 1


@pytest.fixture(scope="module")
def ours():
    with Engine("gptk", smollm2_file(), environment=AVX2) as engine:
        yield engine


@pytest.fixture(scope="module")
def llama():
    """By name, with and without flash attention."""
    python = python_of("LLAMA_AVX2_PYTHON", "llama-cpp-python built without AVX-512")
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                Engine(
                    *("llama.cpp", smollm2_file()),
                    python=python,
                    context=CONTEXT,
                    flash_attn=flash,
                )
            )
            for name, flash in FLASH.items()
        }


def compare(ours, peers, ids, new, **work):
    engines = {"gptk": ours, **peers}
    return in_turns({name: lambda e=e: e.generate(ids, new, **work) for name, e in engines.items()})


@pytest.mark.peers("avx2", "avx2-prompt")
def test_beside_llama_cpp(ours, llama, table):
    table.row("avx2", compare(ours, llama, IDS, NEW), ["gptk"], [*llama], tokens=NEW)
    ids = prompt(512, vocabulary=40_000)
    table.row("avx2-prompt", compare(ours, llama, ids, 1), ["gptk"], [*llama], tokens=len(ids))


@pytest.mark.peers("avx2-beams", "avx2-bf16")
def test_beside_transformers(table):
    """With weights in bfloat16, for which the processor has no instructions."""
    file = smollm2_file()
    with (
        Engine("gptk", file, environment=AVX2, **precision("bfloat16")) as ours,
        Engine("transformers", file, environment=AVX2, dtype="bfloat16") as peer,
    ):
        for key, beams in (("avx2-beams", 4), ("avx2-bf16", 1)):
            times = compare(ours, {"transformers": peer}, IDS, 64, beams=beams)
            table.row(key, times, ["gptk"], ["transformers"], tokens=64)
