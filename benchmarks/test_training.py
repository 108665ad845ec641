"""A training step beside the book's code (package llms-from-scratch), in turns, medians."""

import statistics
import time

import numpy as np
import pytest
import torch

import gptk
from gptk.data import Windows
from gptk.trainer import Trainer

book = pytest.importorskip("llms_from_scratch.ch05", reason="the peer is not installed")

BATCH, LENGTH = 2, 256
BOOK_124M = {
    "vocab_size": 50257,
    "context_length": LENGTH,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.0,
    "qkv_bias": False,
}


def their_step(autocast):
    """A step of the book's train_model_simple on its model."""
    from llms_from_scratch.ch04 import GPTModel

    torch.manual_seed(123)
    model = GPTModel(BOOK_124M).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    ids = torch.randint(0, 50257, (BATCH, LENGTH + 1))

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = book.calc_loss_batch(ids[:, :-1], ids[:, 1:], model, "cpu")
        loss.backward()
        optimizer.step()

    return step


def our_step(**settings):
    config = gptk.TrainConfig(
        architecture="gpt2",
        n_layers=12,
        n_heads=12,
        width=768,
        context_length=LENGTH,
        qkv_bias=False,
        tied_head=False,
        batch_size=BATCH,
        lr=4e-4,
        scheduler="constant",
        regularizers=["weight-decay:strength=0.1"],
        device="cpu",
        **settings,
    )
    data = np.random.default_rng(0).integers(0, 50257, 40 * LENGTH).astype(np.uint16)
    windows = Windows(data, LENGTH)
    return Trainer(gptk.GPT(config.new_model_config(50257)), windows, windows, config).step


def test_training_step(report):
    steps = {
        "the book, float32": their_step(autocast=False),
        "the book, bfloat16": their_step(autocast=True),
        "gptk, float32": our_step(dtype="float32"),
        "gptk, bfloat16": our_step(dtype="bfloat16"),
        "gptk, bfloat16, compiled": our_step(dtype="bfloat16", compile=True),
    }
    times = {name: [] for name in steps}
    for turn in range(6):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
    speeds = {name: BATCH * LENGTH / statistics.median(one) for name, one in times.items()}
    for name, speed in speeds.items():
        ratio = speed / speeds["the book, float32"]
        report(f"training 124M, {BATCH} by {LENGTH}, {name}: {speed:.0f} tokens/s, {ratio:.2f}")
