"""Small models and strategies that several tests share."""

import torch
from hypothesis import strategies as st

from gptk import GPT, GPTConfig, LanguageModel, Tokenizer

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
LLAMA_LIKE = GPTConfig(
    vocab_size=VOCABULARY,
    context_length=96,
    width=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    norm="rms",
    positions="rotary",
    mlp="swiglu",
    mlp_bias=False,
    qkv_bias=False,
    out_bias=False,
    qk_norm=True,
    tied_head=False,
)
CONFIGS = {"gpt2-like": GPT2_LIKE, "llama-like": LLAMA_LIKE}


def small_gpt(config: GPTConfig = LLAMA_LIKE, seed: int = 0) -> GPT:
    """A random GPT with weights large enough that its predictions differ from token to token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def small_lm(config: GPTConfig = LLAMA_LIKE, seed: int = 0) -> LanguageModel:
    """The random GPT with the tokenizer `bytes`."""
    return LanguageModel(small_gpt(config, seed), byte_tokenizer())


def byte_tokenizer() -> Tokenizer:
    from gptk.tokenizer import load_tokenizer

    return load_tokenizer("bytes")


def prompts(max_tokens: int = 12) -> st.SearchStrategy[list[int]]:
    """A prompt as token ids."""
    return st.lists(st.integers(0, 255), min_size=1, max_size=max_tokens)


def batches(max_prompts: int = 4) -> st.SearchStrategy[list[list[int]]]:
    """Prompts of unequal lengths, some perhaps equal."""
    return st.lists(prompts(), min_size=1, max_size=max_prompts)


def logits(rows: int = 3, vocabulary: int = 40) -> st.SearchStrategy[torch.Tensor]:
    """(rows, vocabulary) float32 logits: peaked, flat, with ties, and with masked tokens."""
    value = st.one_of(
        st.floats(-20, 20, width=32),
        st.sampled_from([0.0, 1.0, -1.0, -torch.inf]),
    )
    row = st.lists(value, min_size=vocabulary, max_size=vocabulary).filter(
        lambda r: max(r) > -torch.inf
    )
    return st.lists(row, min_size=rows, max_size=rows).map(torch.tensor)
