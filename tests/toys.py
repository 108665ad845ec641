"""Small models that several tests share; more are in gptk.testing."""

from gptk import GPTConfig, Tokenizer
from gptk.testing.models import TINY as LLAMA_LIKE

VOCABULARY = 257

GPT2_LIKE = GPTConfig(
    vocab_size=VOCABULARY,
    context_length=32,
    width=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=8,
    mlp_width=64,
)
CONFIGS = {"gpt2-like": GPT2_LIKE, "llama-like": LLAMA_LIKE}


def byte_tokenizer() -> Tokenizer:
    from gptk.tokenizer import load_tokenizer

    return load_tokenizer("bytes")
