"""Models in every format of GGUF files: they stay as stored, and compute as the expanded ones.

Matrices that llama.cpp's own quantizer has made are read, too, where llama-cpp-python is installed.
"""

import ctypes
from pathlib import Path

import pytest
import torch
import transformers

import checkpoints
import gptk
from gptk import kernels
from gptk.model.linear import Linear
from program import gptk as run_gptk
from stored_blocks import FORMATS

NEEDS_KERNELS = pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], list(range(40))]


def oracle():
    """A Llama whose widths are multiples of 256."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=checkpoints.VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def load(path, **options):
    return gptk.load(str(path), device="cpu", tokenizer="bytes", **options)


def check_computes_as_expanded(path, kinds):
    """In passes of any size, and in a batch of texts, through all blocks at once."""
    kept, dense = load(path), load(path, quantize="none")
    assert set(kept.model.bytes_by_kind()) == ({"float32", *kinds} if kinds else {"float32"})
    ids = torch.arange(60)[None] % checkpoints.VOCABULARY
    with torch.inference_mode():
        for batch in (ids[:, :1], ids, ids.repeat(4, 1)):
            got, want = (lm.model.logits(lm.model(batch)) for lm in (kept, dense))
            assert (got - want).norm() < 1e-5 * want.norm()
    settings = {"max_new_tokens": 20, "ignore_eos": True}
    both = (lm.generate_batch(PROMPTS, **settings) for lm in (kept, dense))
    for got, want in zip(*both, strict=True):
        assert got.tokens == want.tokens
        assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-4)
    alone = kept.generate(PROMPTS[0], **settings)
    assert alone.tokens == kept.generate_batch(PROMPTS, **settings)[0].tokens


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.usefixtures("both_kernels")
def test_a_model_in_each_format_computes_as_the_expanded_one(format, tmp_path):
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(path, oracle(), format)
    kinds = {f"int{kernels.FORMATS[format].bits}"} if kernels.available() else set()
    check_computes_as_expanded(path, kinds)


def mixed(name):
    """As Q4_K_M mixes them: the values of attention have more bits than queries and keys."""
    for part, format in {"attn_v": "Q6_K", "ffn_gate": "Q5_K", "ffn_down": "Q6_K"}.items():
        if part in name:
            return format
    return "Q8_0" if "token_embd" in name else "Q4_K"


@NEEDS_KERNELS
def test_parts_of_a_matrix_keep_their_formats(tmp_path):
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(path, oracle(), mixed)
    check_computes_as_expanded(path, {"int4", "int8", "int4+int6", "int5+int4", "int6"})
    qkv = load(path).model.blocks[0].attn.qkv
    assert qkv.packed.segments.to_json() == [("Q4_K", 384), ("Q6_K", 128)]
    out = run_gptk("info", path).stdout
    assert "not kept" not in out
    assert "int4+int6" in out


def test_info_names_what_is_expanded(tmp_path):
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(
        path, oracle(), lambda name: "TQ2_0" if "attn_output" in name else "Q8_0"
    )
    out = run_gptk("info", path).stdout
    assert "not kept as stored: blk.0.attn_output.weight (TQ2_0), blk.1.attn_output" in out


QUANTIZED_BY_LLAMA_CPP = {
    "Q4_K_M": {"int4", "int4+int6", "int6"},
    "Q5_K_M": {"int5", "int5+int6", "int6"},
    "Q3_K_M": {"int3", "int3+int5", "int4", "int3+int4", "int6"},
    "Q2_K": {"int2", "int2+int3", "int3", "int6"},
    "Q6_K": {"int6"},
    "Q5_0": {"int5", "int6"},
    "Q5_1": {"int5", "int6"},
    "IQ4_NL": {"int4", "int5", "int6", "int4+int5"},
    "IQ4_XS": {"int4", "int5", "int6", "int4+int5"},
}


@NEEDS_KERNELS
@pytest.mark.parametrize("name", QUANTIZED_BY_LLAMA_CPP)
def test_models_that_llama_cpp_has_quantized(name, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    plain, path = tmp_path / "plain.gguf", tmp_path / "model.gguf"
    checkpoints.write_gguf(plain, oracle())
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    made = llama_cpp.llama_model_quantize(
        str(plain).encode(), str(path).encode(), ctypes.byref(asked)
    )
    assert made == 0
    check_computes_as_expanded(path, set(load(path).model.bytes_by_kind()) - {"float32"})
    model = load(path).model
    assert set(model.bytes_by_kind()) - {"float32"} <= QUANTIZED_BY_LLAMA_CPP[name]
    assert all(layer.packed.kind.startswith("int") for layer in model.modules()
               if isinstance(layer, Linear))  # fmt: skip
    assert sum(model.bytes_by_kind().values()) < 1.05 * Path(path).stat().st_size
