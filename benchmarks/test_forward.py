"""Forward passes: a prompt, and one more token after a context."""

import itertools

import pytest
import torch

import gptk
import machine
import models

DEVICES = ["cpu", "cuda"] if machine.DEVICE == "cpu" else [machine.DEVICE]
MODELS = ["tiny", "smollm2", "gpt2-124M", "gpt2-355M"]
ROWS = [1, 4, 16]
CONTEXTS = [32, 128, 512, 1000, 2000]
KINDS = ["prompt", "token"]


QUICK = {
    ("tiny", 4, 32, "prompt"),
    ("tiny", 1, 32, "token"),
    ("smollm2", 1, 512, "prompt"),
    ("smollm2", 1, 128, "token"),
    ("smollm2", 16, 128, "token"),
    ("gpt2-124M", 1, 128, "prompt"),
    ("gpt2-124M", 1, 128, "token"),
}
"""Model, rows, context and kind of pass, for all dtypes."""


def cases():
    """All valid combinations; those not in QUICK run with --full only."""
    everything = itertools.product(DEVICES, MODELS, models.DTYPES, ROWS, CONTEXTS, KINDS)
    for device, model, dtype, rows, context, kind in everything:
        longest = {"tiny": 32, "smollm2": 2000}.get(model, 1000)
        if (
            context > longest
            or (dtype.startswith("kept") and model != "smollm2")
            or (device == "cuda" and dtype.startswith("kept"))
        ):
            continue
        quick = (model, rows, context, kind) in QUICK
        yield pytest.param(
            *(device, model, dtype, rows, context, kind),
            id=f"{device}-{model}-{dtype}-{rows}x{context}-{kind}",
            marks=[] if quick else [pytest.mark.full],
        )


@pytest.mark.parametrize(("device", "model", "dtype", "rows", "context", "kind"), list(cases()))
def test_forward(device, model, dtype, rows, context, kind, measure):
    """kind: prompt, `context` tokens in each row, or token, one more in each after them."""
    gpt = models.load(model, dtype, device).model
    prompts = [models.prompt(context, row, gpt.config.vocab_size) for row in range(rows)]
    if kind == "prompt":
        work = models.pass_work(gpt, rows, context, dtype=dtype)
        measure(lambda: gptk.DecodeSession(gpt, prompts).logits, work, rounds=3, device=device)
        return
    session = gptk.DecodeSession(gpt, prompts, capacity=context + 32)
    tokens = torch.full((rows,), 5, device=device)
    work = models.pass_work(gpt, rows, 1, context, dtype=dtype)
    measure(lambda: session.extend(tokens), work, rounds=15, warmup=2, device=device)
