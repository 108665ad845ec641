"""gptk beside the code of *Build a Large Language Model (From Scratch)*, and nanoGPT's step."""

import contextlib
import json

import pytest
import torch

import gptk
from engines import book_gpt, generate
from models import AVX2, GPT2_VOCABULARY, precision, prompt
from programs import served
from training_steps import BATCH, LENGTH, book_step, nanogpt_step, our_step, weights
from turns import in_turns

NEW = 64
DTYPES = ("float32", "bfloat16", "int8", "int4")


@pytest.mark.peers("gpt2-book")
def test_generate(table, tmp_path):
    """Greedy decoding; the book's has no KV cache. gptk reads the book's own checkpoint."""
    chapter = pytest.importorskip(
        "llms_from_scratch.ch05", reason="llms-from-scratch is not installed"
    )
    book = book_gpt(1024).eval()
    torch.save(book.state_dict(), tmp_path / "model.pth")
    source = f'llms-from-scratch:path="{tmp_path / "model.pth"}",n_heads=12'
    lms = {dtype: gptk.load(source, device="cpu", **precision(dtype)) for dtype in DTYPES}
    ids = prompt(32, vocabulary=GPT2_VOCABULARY)

    def theirs():
        out = chapter.generate(book, torch.tensor([ids]), NEW, 1024)[0, len(ids) :].tolist()
        assert len(out) == NEW
        return out

    assert generate(lms["float32"], ids, NEW) == theirs()
    functions = {dtype: lambda lm=lm: generate(lm, ids, NEW) for dtype, lm in lms.items()}
    times = in_turns({**functions, "the book": theirs})
    table.row("gpt2-book", times, list(lms), ["the book"], tokens=NEW)


def steps(ours, peers):
    """Step functions by name, of models with equally many weights. peers: (step, model) by name."""
    sizes = {weights(trainer.model) for trainer in ours.values()}
    assert sizes == {weights(model) for _, model in peers.values()}
    return {name: trainer.step for name, trainer in ours.items()} | {
        name: step for name, (step, _) in peers.items()
    }


OURS = {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, compiled": {"dtype": "bfloat16", "compile": True},
}


@pytest.mark.peers("training")
def test_training_step(table):
    """Each in a process of its own; the book's code is unchanged."""
    compare_processes(table, "training", OURS)


@pytest.mark.peers("avx2-training")
def test_training_step_with_avx2(table):
    compare_processes(table, "avx2-training", {"float32": {"dtype": "float32"}}, AVX2)


def compare_processes(table, key, ours, environment=None):
    """ours: settings by name."""
    with contextlib.ExitStack() as stack:
        functions = {
            name: stack.enter_context(
                served("training_steps.py", "gptk", json.dumps(own), environment=environment)
            )
            for name, own in ours.items()
        }
        peer = stack.enter_context(served("training_steps.py", "book", environment=environment))
        times = in_turns({**functions, "the book": peer})
    table.row(key, times, [*ours], ["the book"], tokens=BATCH * LENGTH)


@pytest.mark.full
@pytest.mark.peers("training-shared")
def test_training_step_in_one_process(table):
    """glibc keeps freed memory for both."""
    ours = {name: our_step(**settings) for name, settings in OURS.items()}
    times = in_turns(steps(ours, {"the book": book_step(autocast=False)}))
    table.row("training-shared", times, list(ours), ["the book"], tokens=BATCH * LENGTH)


@pytest.mark.full
@pytest.mark.peers("training-float32", "training-bf16")
def test_training_step_in_equal_precision(table):
    ours = {dtype: our_step(dtype=dtype) for dtype in ("float32", "bfloat16")}
    peers = {
        "the book, float32": book_step(autocast=False),
        "the book, bfloat16": book_step(autocast=True),
    }
    times = in_turns(steps(ours, peers))
    tokens = BATCH * LENGTH
    table.row("training-float32", times, ["float32"], ["the book, float32"], tokens=tokens)
    table.row("training-bf16", times, ["bfloat16"], ["the book, bfloat16"], tokens=tokens)


@pytest.mark.full
@pytest.mark.peers("training-nanogpt", "training-nanogpt-float32")
def test_training_step_of_nanogpt(table):
    """With nanoGPT's model: a tied head and biases everywhere."""
    settings = {"tied_head": True, "qkv_bias": True}
    ours = {dtype: our_step(dtype=dtype, **settings) for dtype in ("float32", "bfloat16")}
    peers = {
        "nanoGPT, float32": nanogpt_step(autocast=False),
        "nanoGPT, bfloat16": nanogpt_step(autocast=True),
    }
    times = in_turns(steps(ours, peers))
    tokens = BATCH * LENGTH
    table.row("training-nanogpt", times, ["bfloat16"], ["nanoGPT, bfloat16"], tokens=tokens)
    table.row("training-nanogpt-float32", times, ["float32"], ["nanoGPT, float32"], tokens=tokens)
