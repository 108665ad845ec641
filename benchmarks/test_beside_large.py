"""A Llama of 1.1 billion weights in Q4_0, beside llama.cpp and OpenVINO GenAI; and memory."""

import gc
import sys

import pytest

import gptk
from engines import FLASH, LlamaCpp, forget, generate, llama_cpp, python_of, smollm2_file
from llama_1b import llama_1b_file
from models import prompt
from programs import Engine, run
from test_beside_itself import MEMORY
from turns import in_turns

NEW = 32
IDS = prompt(8, vocabulary=40_000)


@pytest.fixture(scope="module")
def ours():
    """By name, without options and with activations in bfloat16: they share the weights' memory."""
    path = str(llama_1b_file())
    yield {
        "default": gptk.load(path, device="cpu"),
        "bfloat16": gptk.load(path, device="cpu", dtype="bfloat16"),
    }
    gc.collect()


@pytest.fixture(scope="module")
def llama():
    peers = llama_cpp(256 + NEW + 1, llama_1b_file())
    yield peers
    peers.clear()
    gc.collect()


def rows(table, names, times, peers, tokens):
    """A row for each of ours. names: keys of the table by name."""
    for name, key in names.items():
        table.row(key, times, [name], peers, tokens=tokens)


def timed(ours, peers, ids, new):
    functions = {name: lambda lm=lm: generate(lm, ids, new) for name, lm in ours.items()}
    functions |= {name: lambda peer=peer: peer.generate(ids, new) for name, peer in peers.items()}
    return in_turns(functions)


@pytest.mark.peers("large", "large-bf16", "large-prompt", "large-prompt-bf16")
def test_beside_llama_cpp(ours, llama, table):
    names = {"default": "large", "bfloat16": "large-bf16"}
    rows(table, names, timed(ours, llama, IDS, NEW), [*llama], NEW)
    names = {"default": "large-prompt", "bfloat16": "large-prompt-bf16"}
    ids = prompt(256, vocabulary=40_000)
    rows(table, names, timed(ours, llama, ids, 1), [*llama], len(ids))


@pytest.mark.peers("large-beams", "large-batch")
def test_beside_its_own_greedy(ours, table):
    lm = ours["default"]
    prompts = [prompt(8, row, vocabulary=40_000) for row in range(16)]

    def together():
        forget(lm)
        outs = lm.generate_batch(prompts, max_new_tokens=NEW, ignore_eos=True)
        assert [len(out.tokens) for out in outs] == [NEW] * len(prompts)

    times = in_turns(
        {
            "greedy": lambda: generate(lm, IDS, NEW),
            "beams": lambda: generate(lm, IDS, NEW, sampler="beam:width=4"),
            "together": together,
        }
    )
    table.row("large-beams", times, ["beams"], ["greedy"], tokens=NEW)
    # The time of as many tokens, of one prompt after the other.
    times["one by one"] = len(prompts) * times["greedy"]
    tokens = len(prompts) * NEW
    table.row("large-batch", times, ["together"], ["one by one"], tokens=tokens)


@pytest.mark.full
@pytest.mark.peers("large-openvino", "large-openvino-prompt")
def test_beside_openvino(ours, table):
    python = python_of("OPENVINO_PYTHON", "openvino-genai")
    with Engine("openvino", llama_1b_file(), python=python) as peer:
        for key, ids, new in (
            ("large-openvino", IDS, NEW),
            ("large-openvino-prompt", prompt(256, vocabulary=40_000), 1),
        ):
            times = timed({"gptk": ours["default"]}, {"OpenVINO": peer}, ids, new)
            table.row(key, times, ["gptk"], ["OpenVINO"], tokens=new if new > 1 else len(ids))


@pytest.mark.peers("large-load", "small-load")
@pytest.mark.parametrize("size", ["large", "small"])
def test_first_token_from_the_start_of_loading(size, table):
    """When the file was loaded before; without imports."""
    file = llama_1b_file() if size == "large" else smollm2_file()
    functions = {"gptk": lambda: generate(gptk.load(str(file), device="cpu"), IDS, 1)}
    functions |= {
        name: lambda flash=flash: LlamaCpp(file, 256, flash_attn=flash).generate(IDS, 1)
        for name, flash in FLASH.items()
    }
    table.row(f"{size}-load", in_turns(functions), ["gptk"], [*FLASH])


@pytest.mark.peers
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("size", ["large", "small"])
def test_memory(size, table, tmp_path, monkeypatch):
    """The peak resident size of `gptk generate`, when a file is loaded the first time and again."""
    file = llama_1b_file() if size == "large" else smollm2_file()
    words = ["generate", "The capital of France is", "--model", file, "--max-new-tokens", 32]
    most = 1.3 * file.stat().st_size + 350e6
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path))
    run(sys.executable, "-c", "from gptk import kernels; kernels.available()")
    for time in ("first", "second"):
        peak = int(run(sys.executable, "-c", MEMORY, *words).splitlines()[-1])
        table.bound(
            f"peak resident size, gptk generate, a file of {file.stat().st_size / 1e6:.0f} MB, "
            f"the {time} time",
            f"{peak / 1e6:.0f} MB",
            f"at most {most / 1e6:.0f} MB",
            is_kept=peak <= most,
        )
