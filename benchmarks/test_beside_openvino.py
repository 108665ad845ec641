"""gptk beside OpenVINO GenAI: the same Q4_1 file.

$OPENVINO_PYTHON names the Python of its environment.
"""

import pytest

import gptk
from engines import generate, python_of, smollm2_file
from models import prompt
from programs import Engine
from turns import in_turns

NEW = 128


@pytest.fixture(scope="module")
def peer():
    python = python_of("OPENVINO_PYTHON", "openvino-genai")
    with Engine("openvino", smollm2_file(), python=python) as engine:
        yield engine


@pytest.fixture(scope="module")
def ours():
    """By name, without options and with activations in bfloat16."""
    path = str(smollm2_file())
    return {
        "default": gptk.load(path, device="cpu"),
        "bfloat16": gptk.load(path, device="cpu", dtype="bfloat16"),
    }


def compare(ours, peer, ids, new, rounds=5, **beams):
    """Seconds by name. beams: for gptk a sampler, for the peer a number."""
    sampler = f"beam:width={beams['beams']}" if beams else "greedy"
    functions = {
        name: lambda lm=lm: generate(lm, ids, new, sampler=sampler) for name, lm in ours.items()
    }
    return in_turns(
        {**functions, "OpenVINO": lambda: peer.generate(ids, new, **beams)}, rounds=rounds
    )


@pytest.mark.peers("openvino", "openvino-bf16")
def test_greedy(ours, peer, table):
    ids = ours["default"].encode("The capital of France is")
    times = compare(ours, peer, ids, NEW)
    table.row("openvino", times, ["default"], ["OpenVINO"], tokens=NEW)
    table.row("openvino-bf16", times, ["bfloat16"], ["OpenVINO"], tokens=NEW)


@pytest.mark.peers("openvino-beams")
def test_beams(ours, peer, table):
    ids = ours["default"].encode("The capital of France is")
    times = compare(ours, peer, ids, NEW, beams=4)
    table.row("openvino-beams", times, ["default", "bfloat16"], ["OpenVINO"], tokens=NEW)


@pytest.mark.peers("openvino-prompt", "openvino-prompt-bf16")
def test_prompt(ours, peer, table):
    ids = prompt(512, vocabulary=40_000)
    times = compare(ours, peer, ids, 1, rounds=7)
    table.row("openvino-prompt", times, ["default"], ["OpenVINO"], tokens=len(ids))
    table.row("openvino-prompt-bf16", times, ["bfloat16"], ["OpenVINO"], tokens=len(ids))


@pytest.mark.peers("openvino-first", "openvino-first-bf16")
def test_first_prompt(table):
    """In new processes: the peer compiles its kernels for a length when it first reads one."""
    python = python_of("OPENVINO_PYTHON", "openvino-genai")
    ids = prompt(512, vocabulary=40_000)

    def first(engine, **settings):
        with Engine(engine, smollm2_file(), **settings) as program:
            return program.generate(ids, 1)

    functions = {
        "default": lambda: first("gptk"),
        "bfloat16": lambda: first("gptk", dtype="bfloat16"),
        "OpenVINO": lambda: first("openvino", python=python),
    }
    times = in_turns(functions, rounds=5)
    table.row("openvino-first", times, ["default"], ["OpenVINO"], tokens=len(ids))
    table.row("openvino-first-bf16", times, ["bfloat16"], ["OpenVINO"], tokens=len(ids))
