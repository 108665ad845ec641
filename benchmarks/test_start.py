"""Loading a model, and starting gptk."""

import sys

import pytest

import gptk
import machine
import models
from engines import smollm2_file
from machine import Work
from programs import GPTK, run


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        pytest.param(model, dtype, marks=[] if quick else [pytest.mark.full])
        for model, dtype, quick in (
            ("smollm2", "float32", True),
            ("smollm2", "bfloat16", True),
            ("smollm2", "int8", False),
            ("smollm2", "int4", False),
            ("smollm2", "kept", True),
            ("gpt2-124M", "float32", True),
            ("gpt2-124M", "bfloat16", False),
            ("gpt2-355M", "float32", False),
        )
    ],
)
def test_load(model, dtype, measure):
    """The time after imports. The limit is one read of the file."""
    if model == "smollm2":
        source, size = "smollm2", smollm2_file().stat().st_size
    else:
        source = models.saved(model)
        size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    settings = models.precision(dtype) | {"device": machine.DEVICE}
    measure(lambda: gptk.load(str(source), **settings), Work(bytes=size), rounds=3)


def test_empty_python_program(measure):
    measure(lambda: run(sys.executable, "-c", ""), rounds=10)


def test_gptk_help(measure):
    measure(lambda: run(GPTK, "--help"), rounds=10)


@pytest.mark.parametrize("dtype", ["float32", "kept"])
def test_gptk_first_token(dtype, measure):
    """The time from the start of the process. The limit is one read of the weights."""
    lm = models.load("smollm2", dtype)
    work = Work(tokens=1, bytes=models.weight_bytes(lm.model))
    options = [
        text for pair in models.precision(dtype).items() for text in (f"--{pair[0]}", pair[1])
    ]
    command = [GPTK, "generate", "The capital of France is", "--max-new-tokens", "1", *options]
    command += ["--device", machine.DEVICE]
    measure(lambda: run(*command), work, rounds=2, warmup=1)
