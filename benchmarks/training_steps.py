"""A training step of gptk and of its peers on windows of random tokens."""

import json
import sys

import numpy as np
import pytest
import torch

import gptk
import machine
from engines import book_gpt
from gptk.data.windows import Windows
from gptk.system.memory import keep_freed_memory
from gptk.training.trainer import Trainer
from models import GPT2_VOCABULARY
from programs import serve

BATCH, LENGTH = 2, 256


def our_step(batch=BATCH, length=LENGTH, vocabulary=GPT2_VOCABULARY, **settings):
    """A Trainer of the book's 124M model, with an untied head; call its `step`.

    From then on the process keeps the memory it frees, as that of `gptk train` does.
    """
    defaults = {
        "architecture": "gpt2",
        "n_layers": 12,
        "n_heads": 12,
        "width": 768,
        "context_length": length,
        "qkv_bias": False,
        "tied_head": False,
        "batch_size": batch,
        "lr": 4e-4,
        "scheduler": "constant",
        "regularizers": ["weight-decay:strength=0.1"],
        "device": machine.DEVICE,
    }
    config = gptk.TrainConfig(**{**defaults, **settings})
    data = np.random.default_rng(0).integers(0, vocabulary, 40 * batch * length).astype(np.uint16)
    windows = Windows(data, length)
    trainer = Trainer(gptk.GPT(config.new_model_config(vocabulary)), windows, windows, config)
    keep_freed_memory()
    return trainer


def weights(model):
    """The number of weights, equal on both sides of a comparison."""
    return sum(parameter.numel() for parameter in model.parameters())


def book_step(*, autocast):
    """A step of the book's train_model_simple, and its model."""
    chapter = pytest.importorskip(
        "llms_from_scratch.ch05", reason="llms-from-scratch is not installed"
    )
    model = book_gpt(LENGTH).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    ids = torch.randint(0, GPT2_VOCABULARY, (BATCH, LENGTH + 1))

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = chapter.calc_loss_batch(ids[:, :-1], ids[:, 1:], model, "cpu")
        loss.backward()
        optimizer.step()

    return step, model


def nanogpt_step(*, autocast):
    """A training step as in nanoGPT's train.py, on transformers' GPT-2, and that model.

    nanoGPT is not a package. Its model is replaced by the equivalent GPT2LMHeadModel of
    transformers (a tied head, biases, scaled dot-product attention); the optimizer is nanoGPT's:
    fused AdamW, betas 0.9 and 0.95, gradients clipped at 1.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=LENGTH, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.randint(0, GPT2_VOCABULARY, (BATCH, LENGTH + 1))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model


if __name__ == "__main__":  # a step in its own process: book, or gptk with settings as JSON
    if sys.argv[1] == "book":
        serve(book_step(autocast=False)[0])
    else:
        serve(our_step(**json.loads(sys.argv[2])).step)
