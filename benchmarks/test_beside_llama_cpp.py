"""gptk beside llama.cpp: the same Q4_1 file, greedy."""

import pytest

import gptk
from engines import decode_seconds, generate, llama_cpp, smollm2_file
from models import prompt
from turns import in_turns

NEW = 128


@pytest.fixture(scope="module")
def lm():
    return gptk.load(str(smollm2_file()), device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def default():
    """As it is loaded without options, with activations in float32."""
    return gptk.load(str(smollm2_file()), device="cpu")


@pytest.mark.peers("q41", "q41-default")
def test_greedy(lm, default, table):
    ids = lm.encode("The capital of France is")
    peers = llama_cpp(len(ids) + NEW + 1)
    functions = {
        "gptk": lambda: generate(lm, ids, NEW),
        "default": lambda: generate(default, ids, NEW),
    }
    functions |= {name: lambda peer=peer: peer.generate(ids, NEW) for name, peer in peers.items()}
    times = in_turns(functions)
    table.row("q41", times, ["gptk"], list(peers), tokens=NEW)
    table.row("q41-default", times, ["default"], list(peers), tokens=NEW)


@pytest.mark.peers("prompt-q41", "prompt-default")
def test_prompt(lm, default, table):
    ids = prompt(512, vocabulary=40_000)
    peers = llama_cpp(len(ids) + 2)
    functions = {
        "gptk": lambda: generate(lm, ids, 1),
        "default": lambda: generate(default, ids, 1),
    }
    functions |= {name: lambda peer=peer: peer.generate(ids, 1) for name, peer in peers.items()}
    times = in_turns(functions, rounds=7)
    table.row("prompt-q41", times, ["gptk"], list(peers), tokens=len(ids))
    table.row("prompt-default", times, ["default"], list(peers), tokens=len(ids))


@pytest.mark.peers("long-q41")
def test_greedy_after_a_long_prompt(lm, table):
    """Decoding only, without the prefill."""
    ids = prompt(1500, vocabulary=40_000)
    peers = llama_cpp(len(ids) + NEW + 1)
    functions = {"gptk": lambda: decode_seconds(lm, ids, NEW)}
    functions |= {
        name: lambda peer=peer: peer.decode_seconds(ids, NEW) for name, peer in peers.items()
    }
    note = "the time after the prompt's pass"
    table.row("long-q41", in_turns(functions), ["gptk"], list(peers), tokens=NEW - 1, note=note)
