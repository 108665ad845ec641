"""Training steps of gptk: forward, backward and AdamW."""

import pytest

import models
from training_steps import our_step

SIZES = {  # settings, vocabulary, windows per batch, tokens per window
    "tiny": ({"n_layers": 4, "n_heads": 4, "width": 128}, 257, 12, 64),
    "gpt2-124M": ({}, 50257, 2, 256),
    "gpt2-355M": ({"n_layers": 24, "n_heads": 16, "width": 1024}, 50257, 2, 256),
}
QUICK = [("tiny", "float32", False), ("tiny", "bfloat16", False), ("gpt2-124M", "bfloat16", False)]


@pytest.mark.parametrize(
    ("size", "dtype", "compile"),
    [
        pytest.param(
            *case,
            id="-".join(map(str, case[:2])) + ("-compiled" if case[2] else ""),
            marks=[] if case in QUICK else [pytest.mark.full],
        )
        for size in SIZES
        for dtype in ("float32", "bfloat16")
        for compile in (False, True)
        for case in [(size, dtype, compile)]
    ],
)
def test_training_step(size, dtype, compile, measure):
    sizes, vocabulary, batch, length = SIZES[size]
    trainer = our_step(batch, length, vocabulary, dtype=dtype, compile=compile, **sizes)
    work = models.training_work(trainer.model, batch, length, dtype)
    measure(trainer.step, work, rounds=3 if size != "tiny" else 10)
