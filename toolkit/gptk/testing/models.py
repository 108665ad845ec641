"""Small models for tests: random ones, and ones whose distributions are known exactly."""

import dataclasses
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

import gptk

TINY = gptk.GPTConfig(
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


def tiny_gpt(
    config: gptk.GPTConfig = TINY, *, vocabulary: int | None = None, seed: int = 0
) -> gptk.GPT:
    """A random GPT, always the same for a seed.

    Its weights are large enough that its predictions differ from token to token. vocabulary:
    how many tokens it has, instead of the configuration's number.
    """
    if vocabulary is not None:
        config = dataclasses.replace(config, vocab_size=vocabulary)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = gptk.GPT(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.15)
            else:  # no bias is 0 and no scale is 1, so that a lost one changes the results
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tiny_lm(config: gptk.GPTConfig = TINY, *, seed: int = 0) -> gptk.LanguageModel:
    """The random GPT with bytes as tokens, and token 256 as the end of text."""
    return gptk.LanguageModel(tiny_gpt(config, seed=seed), gptk.load_tokenizer("bytes"))


def markov_lm(
    transitions: Tensor | Sequence[Sequence[float]], tokenizer: gptk.Tokenizer | None = None
) -> gptk.LanguageModel:
    """A model whose next token depends on the last token only, with the probabilities of a matrix.

    transitions: (vocab, vocab), row i the probabilities of the token after token i, or numbers in
    proportion to them. The model's probabilities are within 1e-6 of them, and exactly 0 where they
    are. It is an ordinary GPT: the embedding is one-hot, the block adds nothing, and the head
    holds the log-probabilities. Raises ValueError for another matrix.
    """
    weights = torch.as_tensor(transitions, dtype=torch.float64)
    size = len(weights)
    if weights.shape != (size, size) or not bool(((weights >= 0).all(1) & weights.any(1)).all()):
        raise ValueError("transitions must be a square matrix of probabilities")
    probabilities = weights / weights.sum(dim=1, keepdim=True)
    config = gptk.GPTConfig(
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
        # The norm scales the 1 of a one-hot state to √vocab.
        model.head.weight.copy_(probabilities.log().clamp(min=-1e5).T / size**0.5)
    return gptk.LanguageModel(model, tokenizer)


def prompts(vocabulary: int = 256, max_tokens: int = 12) -> st.SearchStrategy[list[int]]:
    """A prompt as token ids."""
    return st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=max_tokens)


def batches(
    vocabulary: int = 256, max_prompts: int = 4, *, unique: bool = False
) -> st.SearchStrategy[list[list[int]]]:
    """Prompts of unequal lengths; some may be equal unless `unique`."""
    return st.lists(
        prompts(vocabulary),
        min_size=1,
        max_size=max_prompts,
        unique_by=tuple if unique else None,
    )


def logits(rows: int = 3, vocabulary: int = 40) -> st.SearchStrategy[Tensor]:
    """(rows, vocabulary) float32: peaked, flat, with ties, and with masked tokens."""
    value = st.one_of(
        st.floats(-20, 20, width=32),
        st.sampled_from([0.0, 1.0, -1.0, -torch.inf]),
    )
    row = st.lists(value, min_size=vocabulary, max_size=vocabulary).filter(
        lambda r: max(r) > -torch.inf
    )
    return st.lists(row, min_size=rows, max_size=rows).map(torch.tensor)
