"""Small models for tests: random ones, and ones whose distributions are known exactly."""

import dataclasses
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from gptk.language_model import LanguageModel
from gptk.model.config import GPTConfig
from gptk.model.gpt import GPT
from gptk.text.tokenizer import Tokenizer
from gptk.weights.tokenizers import load_tokenizer

TINY = GPTConfig(
    vocab_size=257,
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
"""A Llama-like GPT for the 256 bytes and an end-of-text token."""


def tiny_gpt(config: GPTConfig = TINY, *, vocabulary: int | None = None, seed: int = 0) -> GPT:
    """A random GPT, always the same for a seed.

    Its weights are large enough that its predictions differ from token to token. vocabulary:
    instead of the configuration's.
    """
    if vocabulary is not None:
        config = dataclasses.replace(config, vocab_size=vocabulary)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.15)
            else:  # no bias of zero, no scale of one: each is seen if it is lost
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tiny_lm(config: GPTConfig = TINY, *, seed: int = 0) -> LanguageModel:
    """The random GPT with bytes as tokens, and token 256 as the end of text."""
    return LanguageModel(tiny_gpt(config, seed=seed), load_tokenizer("bytes"))


def markov_lm(
    transitions: Tensor | Sequence[Sequence[float]], tokenizer: Tokenizer | None = None
) -> LanguageModel:
    """A model whose next token depends on the last alone, with probabilities that are given.

    transitions: (vocab, vocab), row i the probabilities of the token after token i, or numbers in
    proportion to them. Zero is taken exactly, other probabilities come back within 1e-6. It is a
    GPT like any other: the embedding is one-hot, the block adds nothing, and the head holds the
    log-probabilities.
    """
    chances = torch.as_tensor(transitions, dtype=torch.float64)
    size = len(chances)
    if chances.shape != (size, size) or not bool(((chances >= 0).all(1) & chances.any(1)).all()):
        raise ValueError("transitions must be a square matrix of probabilities")
    chances = chances / chances.sum(dim=1, keepdim=True)
    config = GPTConfig(
        vocab_size=size,
        context_length=256,
        width=size,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=2,
        mlp_width=1,
        norm="rms",
        norm_eps=0.0,
        positions="rotary",
        mlp_bias=False,
        qkv_bias=False,
        out_bias=False,
        tied_head=False,
    )
    model = tiny_gpt(config)
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(size))
        for name in ("blocks.0.attn.out.weight", "blocks.0.mlp.down.weight"):
            model.get_parameter(name).zero_()
        model.get_parameter("norm.weight").fill_(1)
        # The norm makes √vocab of a one-hot state's 1.
        weight = chances.log().clamp(min=-1e5).T / size**0.5
        model.head.weight.copy_(weight)
    return LanguageModel(model, tokenizer)


def prompts(vocabulary: int = 256, max_tokens: int = 12) -> st.SearchStrategy[list[int]]:
    """A prompt as token ids."""
    return st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=max_tokens)


def batches(
    vocabulary: int = 256, max_prompts: int = 4, *, unique: bool = False
) -> st.SearchStrategy[list[list[int]]]:
    """Prompts of unequal lengths, some perhaps equal."""
    return st.lists(
        prompts(vocabulary),
        min_size=1,
        max_size=max_prompts,
        unique_by=tuple if unique else None,
    )


def logits(rows: int = 3, vocabulary: int = 40) -> st.SearchStrategy[Tensor]:
    """(rows, vocabulary) float32: peaked, flat, with ties, and with tokens that are masked."""
    value = st.one_of(
        st.floats(-20, 20, width=32),
        st.sampled_from([0.0, 1.0, -1.0, -torch.inf]),
    )
    row = st.lists(value, min_size=vocabulary, max_size=vocabulary).filter(
        lambda r: max(r) > -torch.inf
    )
    return st.lists(row, min_size=rows, max_size=rows).map(torch.tensor)
