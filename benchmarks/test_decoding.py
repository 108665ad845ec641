"""Decoding with each sampler, and beams of each width."""

import pytest

import machine
import models
from gptk.plugins.registry import provided
from machine import Work

PROMPT = models.prompt(8)
SAMPLERS = {
    name: f"{name}:{sampler.item.example}" if sampler.item.example else name
    for name, sampler in provided("sampler").items()
}
QUICK = "kept" if machine.DEVICE == "cpu" else "bfloat16"
DTYPES = [
    pytest.param(dtype, marks=[] if dtype == QUICK else [pytest.mark.full])
    for dtype in models.DTYPES
]


def decode(measure, dtype, sampler, new, rows=1):
    """Continue PROMPT with SmolLM2, decoding `rows` rows at a time."""
    lm = models.load("smollm2", dtype)
    token = models.pass_work(lm.model, rows, 1, len(PROMPT) + new // 2, dtype=dtype)
    prompt = models.pass_work(lm.model, 1, len(PROMPT), dtype=dtype)
    work = Work(
        tokens=new,
        bytes=prompt.bytes + (new - 1) * token.bytes,
        operations=prompt.operations + (new - 1) * token.operations,
        dtype=token.dtype,
    )
    settings = {"sampler": sampler, "max_new_tokens": new, "ignore_eos": True, "seed": 0}
    out = measure(lambda: lm.generate(PROMPT, **settings), work, rounds=3)
    assert len(out.tokens) == new


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampler(name, dtype, measure):
    decode(measure, dtype, SAMPLERS[name], 16)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_beams(width, dtype, measure):
    decode(measure, dtype, f"beam:width={width}", 16, rows=width)
