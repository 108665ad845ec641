"""Gemma 3 270M as people download it, in Q4_K_M: transformers' predictions, past its window."""

import pytest
import torch
import transformers

import gptk
from gptk.weights.building import build_model
from gptk_plugins.gguf_file import read_gguf
from gptk_plugins.loaders.gguf import GGUF

pytestmark = pytest.mark.slow

NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


@pytest.fixture(scope="module")
def oracle(gemma_path):
    """transformers' model with the file's weights, dequantized; their names are given by hand."""
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32_768,
        query_pre_attn_scalar=256, sliding_window=512,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    state = {}
    for name, tensor in read_gguf(gemma_path).tensors.items():
        *block, kind, parameter = name.split(".")
        layer = f"layers.{block[1]}." if block else ""
        # llama.cpp's converter has added 1 to the weights of norms.
        weight = tensor.read().float() - float("norm" in kind)
        state[f"model.{layer}{NAMES[kind]}.{parameter}"] = weight
    report = model.load_state_dict(state, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["lm_head.weight"], [])
    return model


@pytest.fixture(scope="module")
def lm(gemma_path):
    checkpoint = GGUF(path=str(gemma_path)).load()
    return gptk.LanguageModel(build_model(checkpoint, "cpu", torch.float32, pack=True))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(262_144, (1, 700), generator=torch.manual_seed(0))


@torch.inference_mode()
def test_logits_are_transformers_past_the_window_too(lm, oracle, ids):
    model = lm.model
    want = oracle(ids).logits
    assert want.std() > 5
    found = model.logits(model(ids))
    torch.testing.assert_close(found, want, atol=1e-3, rtol=0)
    cache = model.new_cache(1, 700)
    model(ids[:, :640], cache)
    for position in range(640, 700):
        step = model.logits(model(ids[:, position : position + 1], cache))[:, 0]
        torch.testing.assert_close(step, want[:, position], atol=1e-3, rtol=0)


@pytest.mark.parametrize("length", [5, 600])
def test_greedy_and_beams_are_transformers(lm, oracle, ids, length):
    prompt = ids[:, :length]
    for beams in (1, 4):
        out = oracle.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, num_beams=beams,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        sampler = f"beam:width={beams}" if beams > 1 else "greedy"
        found = lm.generate(prompt[0].tolist(), sampler=sampler, max_new_tokens=20)
        assert found.tokens == out[0, length:].tolist()
